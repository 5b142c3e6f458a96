"""What is measured of every row of the table of shapes."""

import gc
from collections.abc import Iterator

import torch

from . import cells, memory
from .contenders import EAGER, OURS, contenders, make_inputs
from .errors import errors
from .shapes import Shape, select
from .timing import MIN_ROUNDS, Copies, interleave, medians, ratio, spread

LOOP_ELEMENTS = 2**23  # logits of more would hide the loss behind the layer


def measure_rows(args) -> Iterator[dict]:
    """The machine's copy bandwidth is measured before and after each row: it changes by the
    minute where others use the machine too."""
    copies = Copies()
    before = copies.bandwidth()
    for shape in select(args.op, args.tiny, args.shape):
        row = measure_row(shape, args)
        after = copies.bandwidth()
        row["copy_bytes_per_second"] = (before + after) / 2
        row["share_of_copy_bandwidth"] = (
            row["gigabytes_per_second"] * 1e9 / row["copy_bytes_per_second"]
        )
        before = after
        yield row


def measure_row(shape: Shape, args) -> dict:
    """One set of contenders, compiled once, for everything."""
    gc.collect()
    gc.freeze()  # what is there stays: hundreds of collections need not go through it again
    inputs = make_inputs(shape)
    failed = {}
    rivals = contenders(shape, inputs, args.backend, args.compile, failed=failed)
    steps = {name: rival.step for name, rival in rivals.items()}
    row = time_row(shape, steps, args) | {"failed": failed}
    if args.memory or args.complete:
        row["peak_memory"] = {
            name: (rival.peak or memory.peak(rival.step, inputs)) / (4 * shape.numel)
            for name, rival in rivals.items()
            if rival.result and memory.CLEAR.exists()
        }
    if args.errors or args.complete:
        row["errors"] = errors(shape, inputs, rivals)
    if args.complete and args.threads > 1:
        two = {name: steps[name] for name in ("ours", "eager", "reference") if name in steps}
        torch.set_num_threads(1)
        row["one_thread"] = {n: spread(t) for n, t in interleave(two, MIN_ROUNDS).items()}
        torch.set_num_threads(args.threads)
    if (args.loop or args.complete) and shape.op in OURS and shape.numel <= LOOP_ELEMENTS:
        row["loop"] = loop_row(shape, inputs, args)
    return row


def time_row(shape: Shape, steps, args) -> dict:
    times = interleave(steps, args.rounds, args.seconds, args.cold)
    row = {
        "op": shape.op,
        "shape": shape.label,
        "note": shape.note,
        "logit_bytes": 4 * shape.numel,
        "seconds": {name: spread(t) for name, t in times.items()},
        "ratios": {
            name: ratio(times, *cells.compared(name, times)) for name in times if name != "ours"
        },
    }
    moved = cells.MOVES[shape.op][0] * 4 * shape.numel
    row["gigabytes_per_second"] = moved / row["seconds"]["ours"]["median"] / 1e9
    row["floors"] = {
        name: {"floor": floor, "met": meets(name, row["ratios"][name]["value"], floor)}
        for name, floor in (shape.floors or {}).items()
        if name in row["ratios"]
    }
    return row


def meets(name: str, value: float, floor: float) -> bool:
    return value <= floor if cells.of_theirs(name) else value >= floor


def loop_row(shape: Shape, inputs, args) -> dict[str, float]:
    """The same step between a layer and its update, as in training.

    A thread pool of the package's own, next to torch's, would show here and nowhere else. `idle` is
    the loop without a loss, with a ready-made gradient.
    """
    hidden = torch.randn(*inputs.student.shape[:-1], 128)
    layer = torch.nn.Linear(128, shape.C)
    gradient = torch.randn_like(inputs.student)

    def step_with(backward):
        def step():
            layer.zero_grad(set_to_none=True)
            backward(layer(hidden))
            with torch.no_grad():
                layer.weight.sub_(layer.weight.grad, alpha=1e-6)

        return step

    steps = {
        "ours": step_with(lambda x: OURS[shape.op](inputs, x, backend=args.backend).backward()),
        "eager": step_with(lambda x: EAGER[shape.op](inputs, x).backward()),
        "idle": step_with(lambda x: x.backward(gradient)),
    }
    return medians(steps, MIN_ROUNDS)
