"""The one measuring function: contenders take turns, round after round, in one process.

Whatever else the machine does then hits all alike. Figures are medians over the rounds, with
quartiles. A ratio is the median of the ratios within the rounds that both ran in, so that it
compares what ran side by side: it need not be that of the two medians.
"""

import gc
from functools import partial
from random import Random
from statistics import median, quantiles
from time import perf_counter

import torch

MIN_ROUNDS = 5
TURN = 0.02  # seconds that a turn takes at the least


def interleave(steps, rounds: int, seconds: float | None = None, cold: bool = False):
    """Name -> {round: seconds per step}.

    A round calls each step for at least TURN. With `seconds` every contender has an equal part of
    them: one that has used more sits rounds out, evenly, but never so that it runs in fewer than
    MIN_ROUNDS; the first, which the others are compared with, runs in all. With `cold` the caches
    are emptied before every step.
    """
    flush = torch.empty(64 * 2**20, dtype=torch.uint8) if cold else None
    calls = {name: calls_a_turn(step) for name, step in steps.items()}
    if cold:
        calls = dict.fromkeys(steps, 1)
    times = {name: {} for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    first, order, shuffle = next(iter(steps)), list(steps), Random(0).shuffle

    def takes_part(name: str, done: int) -> bool:
        if seconds is None or name == first:
            return True
        due = len(times[name]) < MIN_ROUNDS * (done + 1) / rounds
        return due or spent[name] <= seconds / len(steps) * done / rounds

    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            shuffle(order)  # nobody always runs after the same neighbour, in its caches and pages
            for name in order:
                if not takes_part(name, done):
                    continue
                if flush is not None:
                    flush.fill_(1)
                step, n = steps[name], calls[name]
                start = perf_counter()
                for _ in range(n):
                    step()
                elapsed = perf_counter() - start
                spent[name] += elapsed
                times[name][done] = elapsed / n
    finally:
        gc.enable()
    return times


def calls_a_turn(step) -> int:
    step()  # compiles, starts threads
    for _ in range(2):
        start = perf_counter()
        step()
        if (took := perf_counter() - start) > TURN:
            return 1
    return max(1, round(TURN / took))


def medians(steps, rounds: int, seconds: float | None = None) -> dict[str, float]:
    return {n: median(t.values()) for n, t in interleave(steps, rounds, seconds).items()}


def spread(times: dict[int, float]) -> dict[str, float]:
    low, mid, high = quantiles(times.values(), method="inclusive")
    return {"median": mid, "p25": low, "p75": high, "rounds": len(times)}


def ratio(times, above: str, below: str) -> dict[str, float]:
    """Median and quartiles of the ratio within the rounds that both ran in."""
    a, b = times[above], times[below]
    within = [a[i] / b[i] for i in a if i in b]
    low, mid, high = quantiles(within, method="inclusive")
    return {"value": mid, "p25": low, "p75": high}


class Copies:
    """The machine's own bandwidth: 128 MB copied into memory that was used before."""

    def __init__(self):
        self.source = torch.ones(2**25)
        self.target = self.source.clone()

    def bandwidth(self, times: int = 5) -> float:
        """Bytes read and written per second."""
        step = partial(self.target.copy_, self.source)
        return 2 * self.source.nbytes / medians({"copy": step}, times)["copy"]
