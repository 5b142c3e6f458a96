"""Did a change make a row slower? Two commits in alternating runs, for maintainers.

    python -m kdkernels.bench.compare main HEAD                   # wall times
    python -m kdkernels.bench.compare main HEAD --instructions    # callgrind: instructions.py

Both commits are built into folders of their own and measured by the benchmark of this checkout. For
wall times the old commit runs in two processes, whose difference is the noise; instructions have
none. Run it from the repository.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median

import torch

from . import instructions
from .shapes import OPS, select

HERE = Path(__file__).parent
# With fewer, the interval of the median would just be their extremes.
MIN_ROUNDS = 6
# A row that moved by less than this is not reported, however quiet the machine.
LEAST = 0.02
LEAST_INSTRUCTIONS = 0.005


# ---------------------------------------------------------------- builds


def git(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(HERE), *command], capture_output=True)


def build(commit: str, folder: Path, pip_options: list[str]) -> Path:
    """Install `commit` into `folder`, with the benchmark of this checkout in it."""
    source, target = folder / "source", folder / "site"
    top = git("rev-parse", "--show-toplevel").stdout.decode().strip()
    source.mkdir(parents=True)
    print(f"building {commit}", flush=True)
    archive = git("-C", top, "archive", commit).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    options = ["-C", "cmake.define.KDKERNELS_CUDA=OFF"]
    subprocess.run([*command, str(target), *options, *pip_options, str(source)], check=True)
    bench = target / "kdkernels" / "bench"
    shutil.rmtree(bench, ignore_errors=True)
    shutil.copytree(HERE, bench, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def environment(site: Path, **variables: str) -> dict[str, str]:
    paths = (str(site), sysconfig.get_path("purelib"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


# Without `site`, or the import hook of an editable install would put its own sources in the place
# of the folder's.
PYTHON = [sys.executable, "-S", "-m"]


def check_sources() -> None:
    """A child process must measure the package of the folder that it runs in."""
    if not Path(__file__).is_relative_to(Path.cwd()):
        raise SystemExit(f"compare: expected the package in {Path.cwd()}, got {__file__}")


# ---------------------------------------------------------------- wall time


def serve(args) -> None:
    """A child: for each row number on stdin, one round of `ours`; its seconds on stdout."""
    from .contenders import contenders, make_inputs
    from .timing import interleave

    torch.set_num_threads(args.threads)
    row, step = None, None
    for line in sys.stdin:
        if row != int(line):
            row = int(line)
            shape = select(tiny=args.tiny)[row]
            step = contenders(shape, make_inputs(shape), only=("ours",))["ours"].step
        print(interleave({"ours": step}, 1)["ours"][0], flush=True)


class Child:
    def __init__(self, site: Path, args):
        command = [*PYTHON, "kdkernels.bench.compare", "--serve"]
        command += ["--threads", str(args.threads), *(["--tiny"] if args.tiny else [])]
        self.process = subprocess.Popen(
            command, cwd=site, env=environment(site), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def measure(self, row: int) -> float:
        self.process.stdin.write(f"{row}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: the process measuring row {row} ended")
        return float(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def wall_times(old: Path, new: Path, rows: list[int], args) -> Iterator[tuple[int, dict]]:
    """Row, and verdict on the seconds of "old", "new" and "again" (the old commit once more)."""
    children = {"old": Child(old, args), "new": Child(new, args), "again": Child(old, args)}
    try:
        for row in rows:
            times = {name: [] for name in children}
            order, shuffle = list(children), Random(0).shuffle
            for _ in range(args.rounds):
                shuffle(order)
                for name in order:
                    times[name].append(children[name].measure(row))
            yield row, verdict(times)
    finally:
        for child in children.values():
            child.end()


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by order statistics: no assumption about the noise."""
    ranked, n = sorted(ratios), len(ratios)
    margin = round(0.98 * n**0.5)  # 1.96 standard deviations of a binomial with p = 1/2
    return ranked[max(0, n // 2 - margin)], ranked[min(n - 1, n // 2 + margin)]


def verdict(times: dict[str, list[float]]) -> dict:
    """Ratio new / old, its interval, and whether it left the band that the noise makes."""
    against = [n / o for n, o in zip(times["new"], times["old"], strict=True)]
    same = [a / o for a, o in zip(times["again"], times["old"], strict=True)]
    low, high = interval(against)
    noise = max(LEAST, *(abs(x - 1) for x in (median(same), *interval(same))))
    moved = "slower" if low > 1 + noise else "faster" if high < 1 - noise else ""
    return {"ratio": median(against), "low": low, "high": high, "noise": noise, "moved": moved}


# ---------------------------------------------------------------- instructions


def instruction_counts(old: Path, new: Path, rows: list[int], args) -> Iterator[tuple[int, dict]]:
    before, after = (count(site, rows, args) for site in (old, new))
    for row in rows:
        yield row, count_verdict(before[row], after[row])


def count(site: Path, rows: list[int], args) -> dict[int, int]:
    """Row -> instructions of the extension in `site`."""
    print(f"counting, {site.parent.name}", flush=True)
    return instructions.count(
        [*PYTHON, "kdkernels.bench.instructions"],
        rows,
        args.tiny,
        folder=site.parent / "callgrind",
        cwd=site,
        env=environment(site, **instructions.SETTINGS),
    )


def count_verdict(old: int, new: int) -> dict:
    ratio = new / old
    moved = abs(ratio - 1) > LEAST_INSTRUCTIONS
    word = ("slower" if ratio > 1 else "faster") if moved else ""
    return {"ratio": ratio, "old": old, "new": new, "moved": word}


# ---------------------------------------------------------------- command


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m kdkernels.bench.compare", description=__doc__.splitlines()[0]
    )
    p.add_argument("commits", nargs="*", metavar="OLD NEW", help="two commits")
    p.add_argument("--op", choices=OPS, help="the rows of one operator")
    p.add_argument("--shape", default="", help="only rows whose sizes contain this")
    p.add_argument("--rounds", type=int, default=25, help="turns of each commit [25]")
    p.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of each commit [the cores]"
    )
    p.add_argument(
        "--instructions", action="store_true", help="count instructions (callgrind), not time"
    )
    p.add_argument("--tiny", action="store_true", help="tiny shapes, only to try the script")
    p.add_argument("--json", type=Path, help="file for the results")
    p.add_argument(
        "--pip", nargs="*", default=[], help="more options of pip install, which builds both"
    )
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    table = select(tiny=args.tiny)
    args.rows = [
        i for i, s in enumerate(table) if args.op in (None, s.op) and args.shape in s.label
    ]
    if not args.serve and len(args.commits) != 2:
        p.error("expected two commits, such as `main HEAD`")
    if not args.rows:
        p.error(f"--shape: no row has {args.shape!r}")
    for name, least in (("rounds", MIN_ROUNDS), ("threads", 1)):
        if getattr(args, name) < least:
            p.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.json and not args.json.parent.is_dir():
        p.error(f"--json: there is no folder {args.json.parent}")
    if args.json and args.json.is_dir():
        p.error(f"--json: expected a file, got the folder {args.json}")
    for commit in args.commits:  # both, before either is built
        if git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").returncode:
            p.error(f"expected a commit of the repository of {HERE}, got {commit!r}")
    return args


def main() -> int:
    args = parse()
    if args.serve:
        check_sources()
        serve(args)
        return 0
    table = select(tiny=args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        old, new = (
            build(c, Path(folder) / n, args.pip)
            for c, n in zip(args.commits, ("old", "new"), strict=True)
        )
        results = {}
        measure = instruction_counts if args.instructions else wall_times
        for i, r in measure(old, new, args.rows, args):
            name = f"{table[i].op} {table[i].label}"
            results[name] = r
            said = (
                f"{r['old']:,} to {r['new']:,} instructions"
                if args.instructions
                else f"[{r['low']:.3f}, {r['high']:.3f}], noise {r['noise']:.1%}"
            )
            print(f"{name}: {r['ratio']:.3f} {said} {r['moved']}", flush=True)
    slower = sum(r["moved"] == "slower" for r in results.values())
    faster = sum(r["moved"] == "faster" for r in results.values())
    print(f"{slower} rows slower, {faster} faster, of {len(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
