"""This package against torch and its peers in one run: times, floors, memory, errors, scaling.

    python -m kdkernels.bench                    # everything, into kdkernels-bench/
    python -m kdkernels.bench --op ctc_loss      # the times of one operator's rows
    python -m kdkernels.bench --op ctc_loss --all --json FILE

The contenders take turns, round after round (timing.py). What the numbers mean stands in the
report.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import markdown, memory
from .accuracy import accuracy
from .contenders import EAGER, OURS, contenders, make_inputs
from .errors import error_row
from .machine import describe
from .scaling import scaling, training_step
from .shapes import OPS, Shape, select
from .timing import copy_bandwidth, interleave, medians, ratio, spread

# Contenders that ours is compared with as so many times as fast; of the others (a copy, our two
# losses in turn) ours takes a share of the time.
FASTER_THAN = ("eager", "compile", "trl", "liger", "optax", "reference", "torchaudio")


def time_row(shape: Shape, args) -> dict:
    steps = contenders(shape, make_inputs(shape), args.backend, args.compile)
    times = interleave(steps, args.rounds, args.seconds, args.cold)
    row = {
        "op": shape.op,
        "shape": shape.label,
        "note": shape.note,
        "logit_bytes": 4 * shape.numel,
        "seconds": {name: spread(t) for name, t in times.items()},
        "ratios": {
            name: ratio(times, name, "ours") if name in FASTER_THAN else ratio(times, "ours", name)
            for name in times
            if name != "ours"
        },
    }
    moved = markdown.MOVES[shape.op][0] * 4 * shape.numel
    row["gigabytes_per_second"] = moved / row["seconds"]["ours"]["median"] / 1e9
    row["floors"] = {
        name: {"floor": floor, "met": meets(name, row["ratios"][name]["value"], floor)}
        for name, floor in (shape.floors or {}).items()
        if name in row["ratios"]
    }
    if args.complete and args.threads > 1:
        torch.set_num_threads(1)
        two = ("ours", "eager")
        row["one_thread"] = medians(
            {n: s for n, s in steps.items() if n in two}, args.rounds, args.seconds / 3
        )
        torch.set_num_threads(args.threads)
    return row


def meets(name: str, value: float, floor: float) -> bool:
    return value >= floor if name in FASTER_THAN else value <= floor


def loop_row(shape: Shape, args) -> dict[str, float]:
    """The same step between a layer and its update, as in training.

    A thread pool of the package's own, next to torch's, would show here and nowhere else. `idle` is
    the loop with a loss that costs next to nothing.
    """
    inputs = make_inputs(shape)
    hidden = torch.randn(*inputs.student.shape[:-1], 128)
    layer = torch.nn.Linear(128, shape.C)

    def idle(i, x):
        return (x * i.teacher).mean()

    def loop_of(loss):
        def step():
            layer.zero_grad(set_to_none=True)
            loss(inputs, layer(hidden)).backward()
            with torch.no_grad():
                layer.weight.sub_(layer.weight.grad, alpha=1e-6)

        return step

    def ours(i, x):
        return OURS[shape.op](i, x, backend=args.backend)

    losses = {"ours": ours, "eager": EAGER[shape.op], "idle": idle}
    steps = {name: loop_of(loss) for name, loss in losses.items()}
    return medians(steps, args.rounds, args.seconds / 3)


def measure_rows(args, bandwidth: float) -> list[dict]:
    wanted = [
        (i, shape)
        for i, shape in enumerate(select(tiny=args.tiny))
        if args.op in (None, shape.op) and (args.shape or "") in shape.label
    ]
    rows = {}
    for i, shape in wanted:
        row = rows[i] = time_row(shape, args)
        row["share_of_copy_bandwidth"] = row["gigabytes_per_second"] * 1e9 / bandwidth
        if (args.loop or args.complete) and shape.op in OURS:
            row["loop"] = loop_row(shape, args)
        if args.errors or args.complete:
            names = [n for n in row["seconds"] if n != "copy"]
            row["errors"] = error_row(shape, names, args.backend)
        print(markdown.row_text(row), flush=True)
    if args.memory or args.complete:
        names = {i: [n for n in row["seconds"] if n != "copy"] for i, row in rows.items()}
        for i, peaks in memory.peaks(names, args).items():
            rows[i]["peak_memory"] = peaks
    return list(rows.values())


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--op", choices=OPS, help="the rows of one operator: only times, without --all")
    p.add_argument("--shape", help="only rows whose sizes contain this, such as '500, 32'")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument(
        "--seconds", type=float, help="begin no round of a row after this; 2 where all is measured"
    )
    p.add_argument("--backend", help="backend of this package")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    p.add_argument("--cold", action="store_true", help="empty the caches before every step")
    p.add_argument("--memory", action="store_true", help="peak memory of a step too")
    p.add_argument("--loop", action="store_true", help="between a layer and its update too")
    p.add_argument("--errors", action="store_true", help="errors against float64 too")
    p.add_argument("--all", action="store_true", help="memory, loop, errors and one thread")
    p.add_argument("--tiny", action="store_true", help="tiny shapes: try the script")
    p.add_argument("--check", action="store_true", help="exit with 1 when a floor is missed")
    p.add_argument("--json", type=Path, help="write the results here too")
    p.add_argument("--out", type=Path, default=Path("kdkernels-bench"), help="folder of the report")
    p.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.whole = not (args.op or args.shape)
    args.complete = args.all or args.whole
    if args.seconds is None:
        args.seconds = 2.0 if args.whole else float("inf")
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak:
        name, *rows = args.peak
        print(json.dumps(memory.child(name, list(map(int, rows)), args.tiny, args.backend)))
        return 0
    result = describe(args)
    bandwidth = result["copy_bytes_per_second"] = copy_bandwidth()
    print(markdown.conditions(result))
    result["rows"] = measure_rows(args, bandwidth)
    if args.whole:
        print("\naccuracy, scaling, training step ...", flush=True)
        result["accuracy"] = accuracy(args)
        result["scaling"] = scaling(args)
        result["training_step"] = training_step(args)
    missed = sum(not f["met"] for row in result["rows"] for f in row["floors"].values())
    print(f"\n{missed} floors missed")
    if args.json:
        write(args.json, json.dumps(result, indent=1) + "\n")
    if args.whole:
        write(args.out / "report.json", json.dumps(result, indent=1) + "\n")
        write(args.out / "report.md", markdown.report([result]))
        print(f"report: {args.out / 'report.md'}")
    return 1 if args.check and missed else 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
