"""The one measuring function: contenders take turns, round after round, in one process.

What else the machine does then hits all alike. Figures are medians over the rounds, ratios are
ratios of medians, and the spread of a ratio is the quartiles of the ratio within a round.
"""

import gc
from statistics import median, quantiles
from time import perf_counter

import torch

MIN_ROUNDS = 5


def interleave(steps, rounds: int, seconds: float | None = None, cold: bool = False):
    """Name -> seconds per step, one entry a round.

    A round calls each step for at least 20 ms. After `seconds` no further round begins, once there
    are MIN_ROUNDS. With `cold` the caches are emptied before every step.
    """
    flush = torch.empty(64 * 2**20, dtype=torch.uint8) if cold else None
    calls = {}
    for name, step in steps.items():
        step()  # compiles, starts threads
        step()
        start = perf_counter()
        step()
        calls[name] = 1 if cold else max(1, round(0.02 / (perf_counter() - start)))
    times = {name: [] for name in steps}
    order = list(steps)
    gc.collect()
    gc.disable()
    began = perf_counter()
    try:
        for done in range(rounds):
            if seconds is not None and done >= MIN_ROUNDS and perf_counter() - began > seconds:
                break
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


def medians(steps, rounds: int, seconds: float | None = None) -> dict[str, float]:
    return {name: median(t) for name, t in interleave(steps, rounds, seconds).items()}


def spread(times: list[float]) -> dict[str, float]:
    low, mid, high = quantiles(times)
    return {"median": mid, "p25": low, "p75": high}


def ratio(times, above: str, below: str) -> dict[str, float]:
    """Ratio of medians, and quartiles of the ratio within a round."""
    low, _, high = quantiles([a / b for a, b in zip(times[above], times[below], strict=True)])
    return {"value": median(times[above]) / median(times[below]), "p25": low, "p75": high}


def copy_bandwidth() -> float:
    """Bytes read and written per second, copying 128 MB into memory that was used before."""
    source = torch.ones(2**25)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, 9)["copy"]
