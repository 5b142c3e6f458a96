"""Puts results into the README, between its two `speed` markers, and into docs/.

python -m kdkernels.bench.report benchmarks/results/*.json [--root .]
"""

import argparse
import json
import re
from pathlib import Path

from . import markdown, plots

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
PAGE = "benchmarks.md"


def with_section(readme: str, section: str) -> str:
    text, n = re.subn(
        f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{section}\n{END}", readme, flags=re.S
    )
    if n != 1:
        raise SystemExit(f"README.md: expected one pair of {BEGIN} and {END}, found {n}")
    return text


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("json", type=Path, nargs="+")
    p.add_argument("--root", type=Path, default=Path(), help="folder of README.md and docs/")
    args = p.parse_args()
    results = [json.loads(path.read_text()) for path in args.json]
    readme, docs = args.root / "README.md", args.root / "docs"
    readme.write_text(with_section(readme.read_text(), markdown.readme_section(results)))
    docs.mkdir(exist_ok=True)
    for old in docs.glob("benchmark-*.png"):
        old.unlink()
    pictures = plots.draw(results, docs)
    (docs / PAGE).write_text(markdown.report(results, pictures))


if __name__ == "__main__":
    main()
