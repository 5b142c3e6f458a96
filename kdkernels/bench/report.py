"""Puts results into the README, between its markers, and into docs/.

python -m kdkernels.bench.report benchmarks/results/*.json [--root .]
"""

import argparse
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

from . import markdown, plots
from .shapes import SHAPES

README = {"figures": markdown.headline, "speed": markdown.readme_section}
PAGE = "benchmarks.md"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def with_section(readme: str, name: str, section: str) -> str:
    begin, end = markers(name)
    text, n = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{section}\n{end}", readme, flags=re.S
    )
    if n != 1:
        raise SystemExit(f"README.md: expected one pair of {begin} and {end}, found {n}")
    return text


def checked(result) -> dict:
    """The result, if it is that of a whole run; ValueError says what is wrong with it."""
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError("it has no rows")
    every = {(s.op, s.label) for s in SHAPES}
    if not all(isinstance(row, dict) and {"op", "shape"} <= row.keys() for row in result["rows"]):
        raise ValueError("its rows have no op and shape")
    if missing := every - {(row["op"], row["shape"]) for row in result["rows"]}:
        raise ValueError(f"{len(missing)} of the {len(every)} rows are not in it")
    for part in ("accuracy", "scaling", "training_step"):  # made after the rows
        if part not in result:
            raise ValueError(f"it ends before {part}")
    return result


def main():
    p = argparse.ArgumentParser(
        prog="python -m kdkernels.bench.report", description=__doc__.splitlines()[0]
    )
    p.add_argument("json", type=Path, nargs="+", help="what `kdkernels.bench --json` wrote")
    p.add_argument("--root", type=Path, default=Path(), help="folder of README.md and docs/ [.]")
    args = p.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        p.error('matplotlib is missing: pip install "kdkernels[bench]"')
    results = []
    for path in args.json:
        try:
            results.append(checked(json.loads(path.read_text())))
        except (OSError, ValueError) as error:
            p.error(f"{path} is not a result of `python -m kdkernels.bench --json`: {error}")
    readme, docs = args.root / "README.md", args.root / "docs"
    if not readme.is_file():
        p.error(f"there is no {readme}; run it from the repository, or give --root")
    text = readme.read_text()
    for name, section in README.items():
        text = with_section(text, name, section(results))
    with tempfile.TemporaryDirectory() as folder:  # all is made before anything is replaced
        pictures = plots.draw(results, Path(folder))
        page = markdown.report(results, pictures)
        docs.mkdir(exist_ok=True)
        for old in docs.glob("benchmark-*.png"):
            old.unlink()
        for name in pictures:
            shutil.copy(Path(folder) / name, docs)
    (docs / PAGE).write_text(page)
    readme.write_text(text)


if __name__ == "__main__":
    main()
