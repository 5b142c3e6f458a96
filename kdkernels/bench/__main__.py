"""This package against torch and its peers in one run: times, floors, memory, errors, scaling.

    python -m kdkernels.bench                    # everything, into kdkernels-bench/
    python -m kdkernels.bench --op ctc_loss      # the times of one operator's rows
    python -m kdkernels.bench --op ctc_loss --all --json FILE

The contenders take turns, round after round (timing.py). What the numbers mean stands in the
report.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

import kdkernels as kd

from ..backends import select as select_backend
from . import markdown
from .accuracy import accuracy
from .machine import describe
from .rows import measure_rows
from .scaling import scaling, training_step
from .shapes import OPS, select


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        given = action.default not in (None, False)
        return super()._get_help_string(action) if given else action.help


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m kdkernels.bench",
        description=__doc__.splitlines()[0],
        formatter_class=Help,
    )
    p.add_argument("--op", choices=OPS, help="the rows of one operator: only times, without --all")
    p.add_argument("--shape", help="only rows whose sizes contain this, such as '500, 32'")
    p.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch and of this package"
    )
    p.add_argument("--rounds", type=int, default=15, help="turns that a contender gets at a row")
    p.add_argument(
        "--seconds",
        type=float,
        help="for the times of a row, shared by its contenders: a slow one sits rounds out, but "
        "runs in at least five (default: 1.4 for the whole benchmark; no limit with --op or "
        "--shape)",
    )
    p.add_argument("--backend", help="backend of this package (default: the best one)")
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile as a contender",
    )
    p.add_argument("--cold", action="store_true", help="empty the caches before every step")
    p.add_argument(
        "--huge-pages",
        action="store_true",
        help="give every contender the huge pages that this package asks for (Linux, glibc)",
    )
    p.add_argument("--memory", action="store_true", help="also the peak memory of a step")
    p.add_argument("--loop", action="store_true", help="also times between a layer and its update")
    p.add_argument("--errors", action="store_true", help="also errors against float64")
    p.add_argument(
        "--all",
        action="store_true",
        help="--memory, --loop, --errors, and times on one thread; on without --op and --shape",
    )
    p.add_argument("--tiny", action="store_true", help="tiny shapes, only to try the script")
    p.add_argument("--check", action="store_true", help="exit with 1 where a floor is missed")
    p.add_argument("--json", type=Path, help="file for the results")
    p.add_argument(
        "--out",
        type=Path,
        help="folder of the report (default: kdkernels-bench, or kdkernels-bench/tiny)",
    )
    args = p.parse_args(arguments)
    if args.out and (args.op or args.shape):
        p.error("--out is of the report on all rows, without --op and --shape; --json takes some")
    if args.out is None:
        args.out = Path("kdkernels-bench/tiny" if args.tiny else "kdkernels-bench")
    if not select(args.op, args.tiny, args.shape):
        labels = ", ".join(dict.fromkeys(s.label for s in select(args.op, args.tiny)))
        p.error(f"--shape: no row has {args.shape!r}; there are {labels}")
    for name, least in (("threads", 1), ("rounds", 2)):
        if getattr(args, name) < least:
            p.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.seconds is not None and not args.seconds > 0:
        p.error(f"--seconds must be greater than 0, got {args.seconds}")
    try:
        select_backend("kd_loss", "cpu")
    except ValueError as error:  # KDKERNELS_BACKEND names one that is not here
        p.error(str(error))
    here = [b for b in kd.available("kd_loss", "cpu") if b != "cuda_emulated"]
    if args.backend not in (None, *here):
        p.error(f"--backend must be one of {', '.join(here)}, got {args.backend}")
    if args.huge_pages and markdown.HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", ""):
        others = os.environ.get("GLIBC_TUNABLES")
        tunables = [*([others] if others else []), markdown.HUGE_PAGES]
        os.environ["GLIBC_TUNABLES"] = ":".join(tunables)  # read when a process starts
        os.execv(sys.executable, [sys.executable, "-m", "kdkernels.bench", *sys.argv[1:]])
    args.whole = not (args.op or args.shape)
    args.complete = args.all or args.whole
    if args.seconds is None:
        args.seconds = 1.4 if args.whole else float("inf")
    if args.json and args.json.is_dir():
        p.error(f"--json: expected a file, got the folder {args.json}")
    if args.threads > 4 * os.cpu_count():
        p.error(f"--threads must be at most 4 times the {os.cpu_count()} cores, got {args.threads}")
    for folder in filter(None, (args.json and args.json.parent, args.whole and args.out)):
        try:  # before the work, not after it
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            p.error(f"cannot write into the folder {folder}: {error.strerror}")
    return args


def save(path: Path, text: str) -> None:
    """Whole or not at all: what was there before stays where the disk is full. Into a pipe or a
    device, as /dev/stdout, it is written."""
    special = path.exists() and not path.is_file()
    target = path if special else path.resolve()
    temporary = target if special else target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        if not special:
            temporary.replace(target)
    except OSError as error:
        if not special:
            temporary.unlink(missing_ok=True)
        sys.exit(f"bench: cannot write {path}: {error.strerror or error}")


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    began = perf_counter()
    result = describe(args)
    print(markdown.conditions(result), markdown.peers_list(result), sep="\n\n")
    named = args.backend or os.environ.get("KDKERNELS_BACKEND")
    if "reference" in result["backend"] and not named:
        print("WARNING: the compiled extension is not here: plain torch is measured as ours.")
    result["rows"] = []
    try:
        for row in measure_rows(args):
            result["rows"].append(row)
            print(markdown.row_text(row), flush=True)
        if args.whole:
            print("\naccuracy, scaling, training step ...", flush=True)
            result["accuracy"] = accuracy(args)
            result["scaling"] = scaling(args)
            result["training_step"] = training_step(args)
    except KeyboardInterrupt:
        done = f"{len(result['rows'])} rows are done"
        if args.json:
            save(args.json, json.dumps(result, indent=1) + "\n")
            done += f", and in {args.json}"
        print(f"stopped: {done}", file=sys.stderr)
        return 130
    result["took_seconds"] = perf_counter() - began
    missed = sum(not f["met"] for row in result["rows"] for f in row["floors"].values())
    tiny = " (they are not for tiny shapes)" if args.tiny else ""
    print(f"\nfloors missed: {missed}{tiny}; {result['took_seconds']:.0f} s")
    if args.json:
        save(args.json, json.dumps(result, indent=1) + "\n")
    if args.whole:
        save(args.out / "report.json", json.dumps(result, indent=1) + "\n")
        save(args.out / "report.md", markdown.report([result]))
        print(f"\n{markdown.summary(result)}\n\nAll of it: {args.out / 'report.md'}")
    return 1 if args.check and missed and not args.tiny else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
