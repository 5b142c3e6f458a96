"""This package against torch in one run: times, floors, peak memory, errors.

    python -m kdkernels.bench [--op ctc_loss] [--all] [--json FILE]

The contenders take turns, round after round, so that what else the machine does hits all alike;
figures are medians over the rounds, ratios are ratios of medians, and the brackets beside a ratio
are the quartiles of the ratio within a round.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch

import kdkernels

from . import peers
from .contenders import EAGER, OURS, contenders, make_inputs
from .errors import error_row
from .shapes import OPS, Shape, select

# Contenders that ours is compared with as so many times as fast.
FASTER_THAN = ("eager", "compile", "optax")

# Logit tensors that a step must read or write at the least.
MOVES = {"kd_loss": 3, "ctc_loss": 3, "ctc_kd_loss": 5}


# ---------------------------------------------------------------- time


def interleave(steps, rounds: int, min_seconds: float = 0.02, cold: bool = False):
    """Name -> seconds per step, one entry a round."""
    flush = torch.empty(64 * 2**20, dtype=torch.uint8) if cold else None
    calls = {}
    for name, step in steps.items():
        step()  # compiles, starts threads
        step()
        start = perf_counter()
        step()
        calls[name] = 1 if cold else max(1, round(min_seconds / (perf_counter() - start)))
    times = {name: [] for name in steps}
    order = list(steps)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                if flush is not None:
                    flush.fill_(1)
                step, n = steps[name], calls[name]
                start = perf_counter()
                for _ in range(n):
                    step()
                times[name].append((perf_counter() - start) / n)
            order.append(order.pop(0))  # nobody always runs after the same neighbour
    finally:
        gc.enable()
    return times


def ratio(times, above: str, below: str) -> dict[str, float]:
    """Ratio of medians, and quartiles of the ratio within a round."""
    low, _, high = quantiles([a / b for a, b in zip(times[above], times[below], strict=True)])
    return {"value": median(times[above]) / median(times[below]), "p25": low, "p75": high}


def copy_bandwidth() -> float:
    """Bytes read and written per second, copying 128 MB into memory that was used before."""
    source = torch.ones(2**25)
    target = torch.empty_like(source).copy_(source)
    (times,) = interleave({"copy": lambda: target.copy_(source)}, 9).values()
    return 2 * source.nbytes / median(times)


def time_row(shape: Shape, args) -> dict:
    inputs = make_inputs(shape)
    steps = contenders(shape, inputs, args.backend, args.compile)
    times = interleave(steps, args.rounds, cold=args.cold)
    row = {"seconds": {}, "ratios": {}}
    for name, t in times.items():
        low, mid, high = quantiles(t)
        row["seconds"][name] = {"median": mid, "p25": low, "p75": high}
    for name in times:
        if name in FASTER_THAN:  # times as fast as torch
            row["ratios"][name] = ratio(times, name, "ours")
        elif name in ("copy", "separate"):  # share of their time
            row["ratios"][name] = ratio(times, "ours", name)
    ours = row["seconds"]["ours"]["median"]
    row["gigabytes_per_second"] = MOVES[shape.op] * 4 * shape.numel / ours / 1e9
    row["floors"] = {
        name: {"floor": floor, "met": meets(name, row["ratios"][name]["value"], floor)}
        for name, floor in (shape.floors or {}).items()
        if name in row["ratios"]
    }
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
    times = interleave({name: loop_of(loss) for name, loss in losses.items()}, args.rounds)
    return {name: median(t) for name, t in times.items()}


# ---------------------------------------------------------------- memory


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, its peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_of_one_step(shape: Shape, name: str, args) -> int:
    """Bytes beyond the inputs that one step has in use at its peak, gradient included."""
    tiny = next(s for s in select(shape.op, tiny=True))
    contenders(tiny, make_inputs(tiny), args.backend)[name]()  # code pages, threads
    inputs = make_inputs(shape)
    step = contenders(shape, inputs, args.backend)[name]
    if name == "compile":
        step()
        inputs.student.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def memory_row(shape: Shape, names, args) -> dict[str, float]:
    """Peak in units of one logit tensor, each contender in a process of its own."""
    index = select(tiny=args.tiny).index(shape)
    peaks = {}
    for name in names:
        command = [sys.executable, "-m", "kdkernels.bench", "--peak", str(index), name, *args.child]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[name] = int(out.split()[-1]) / (4 * shape.numel)
    return peaks


# ---------------------------------------------------------------- report


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=here, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(args) -> dict:
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kdkernels": kdkernels.__version__,
        },
        "commit": git_commit(),
        "peers": peers.installed(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cold": args.cold,
        "backend": args.backend or os.environ.get("KDKERNELS_BACKEND") or "default",
        "dtype": "float32",
        "seed": 0,
    }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def print_row(row: dict) -> None:
    times = "  ".join(f"{n} {milliseconds(t['median'])}" for n, t in row["seconds"].items())
    print(f"\n{row['op']} {row['shape']}  {row['note']}\n  {times}")
    for name, r in row["ratios"].items():
        said = "x as fast as" if name in FASTER_THAN else "x the time of"
        line = f"  {r['value']:.3g} {said} {name} [{r['p25']:.3g}, {r['p75']:.3g}]"
        if name in row["floors"]:
            f = row["floors"][name]
            sign = ">=" if name in FASTER_THAN else "<="
            line += f"   floor {sign} {f['floor']:g}: {'met' if f['met'] else 'MISSED'}"
        print(line)
    print(
        f"  {row['gigabytes_per_second']:.3g} GB/s of {MOVES[row['op']]} logit tensors, "
        f"{row['share_of_copy_bandwidth']:.0%} of this machine's copy"
    )
    if "peak_memory" in row:
        peaks = "  ".join(f"{n} {v:.2f}" for n, v in row["peak_memory"].items())
        print(f"  peak memory, in logit tensors: {peaks}")
    if "loop" in row:
        print("  in a loop: " + "  ".join(f"{n} {milliseconds(t)}" for n, t in row["loop"].items()))
    for name, e in row.get("errors", {}).items():
        print(
            f"  {name}: loss off by {e['loss_relative']:.1e}, gradient by {e['grad_absolute']:.1e}"
            + ("   DIFFERS from float64" if e["differs"] else "")
        )


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--op", choices=OPS)
    p.add_argument("--shape", help="only rows whose sizes contain this, such as '500, 32'")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--backend", help="backend of this package")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    p.add_argument("--cold", action="store_true", help="empty the caches before every step")
    p.add_argument("--memory", action="store_true", help="peak memory of a step too")
    p.add_argument("--loop", action="store_true", help="between a layer and its update too")
    p.add_argument("--errors", action="store_true", help="errors against float64 too")
    p.add_argument("--all", action="store_true", help="memory, loop and errors")
    p.add_argument("--tiny", action="store_true", help="tiny shapes: try the script")
    p.add_argument("--check", action="store_true", help="exit with 1 when a floor is missed")
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.child = ["--threads", str(args.threads)]
    args.child += ["--tiny"] if args.tiny else []
    args.child += ["--backend", args.backend] if args.backend else []
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_of_one_step(select(tiny=args.tiny)[int(args.peak[0])], args.peak[1], args))
        return 0
    result = describe(args)
    result["copy_bytes_per_second"] = bandwidth = copy_bandwidth()
    print(json.dumps(result, indent=1))
    result["rows"] = []
    for shape in select(args.op, args.tiny):
        if args.shape and args.shape not in shape.label:
            continue
        row = {"op": shape.op, "shape": shape.label, "note": shape.note}
        row["logit_bytes"] = 4 * shape.numel
        row |= time_row(shape, args)
        row["share_of_copy_bandwidth"] = row["gigabytes_per_second"] * 1e9 / bandwidth
        if args.memory or args.all:
            names = [n for n in row["seconds"] if n not in ("copy", "optax")]
            row["peak_memory"] = memory_row(shape, names, args)
        if args.loop or args.all:
            row["loop"] = loop_row(shape, args)
        if args.errors or args.all:
            names = [n for n in row["seconds"] if n != "copy"]
            row["errors"] = error_row(shape, names, args.backend)
        print_row(row)
        result["rows"].append(row)
    missed = sum(not f["met"] for row in result["rows"] for f in row["floors"].values())
    print(f"\n{missed} floors missed")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
