"""The cost of one training step's distillation loss: these ops and torch's own, in turn."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _memory

from . import losses
from .batches import Batch
from .settings import Settings

HALFWAY = 0.5  # of the training, for a kd_weight that changes


def composite(logits: Tensor, lengths: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """The same loss in torch's own ops."""
    log_probs = F.log_softmax(logits.float(), -1)
    some = batch.labelled
    ctc = F.ctc_loss(
        log_probs[some].transpose(0, 1),
        batch.targets[some],
        lengths[some],
        batch.target_lengths[some],
        zero_infinity=True,
    )
    student = F.log_softmax(logits.float() / settings.temperature, -1)
    teacher = F.log_softmax(batch.teacher_logits.float() / settings.temperature, -1)

    def kl(q: Tensor, p: Tensor) -> Tensor:
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    if settings.divergence == "jsd":
        middle = torch.logaddexp(student, teacher) - math.log(2)
        divergence = (kl(middle, teacher) + kl(middle, student)) / 2
    elif settings.divergence == "reverse_kl":
        divergence = kl(teacher, student)
    else:
        divergence = kl(student, teacher)
    valid = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    weight = valid if batch.frame_weight is None else valid * batch.frame_weight
    kd_term = (divergence * weight).sum() / weight.sum() * settings.temperature**2
    schedule = losses.SCHEDULES[settings.kd_schedule](HALFWAY)
    return settings.ctc_weight * ctc + settings.kd_weight * schedule * kd_term


def fused(logits: Tensor, lengths: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """The loss with which the distilled student is trained."""
    return losses.distil(logits, lengths, batch, HALFWAY, settings)


def compare(
    logits: Tensor, lengths: Tensor, batch: Batch, settings: Settings, runs: int = 31
) -> dict[str, float]:
    """Medians of loss and gradient, in milliseconds; their ratio; the relative difference of the
    two losses; peaks of memory, in bytes."""
    times: dict[str, list[float]] = {"fused": [], "torch": []}
    losses = {}
    for _ in range(runs):
        for name, loss in (("fused", fused), ("torch", composite)):
            milliseconds, losses[name] = _time(loss, logits, lengths, batch, settings)
            times[name].append(milliseconds)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    difference = abs(losses["fused"] - losses["torch"]) / max(abs(losses["torch"]), 1e-9)
    peaks = {
        f"{name}_bytes": _peak(loss, logits, lengths, batch, settings)
        for name, loss in (("fused", fused), ("torch", composite))
    }
    speedup = medians["torch"] / medians["fused"]
    return {**medians, "speedup": speedup, "difference": difference, **peaks}


def _peak(loss: Callable, logits: Tensor, *rest) -> int:
    """Peak bytes from torch's allocator during loss and gradient."""
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _time(loss, logits, *rest)
        return torch.cuda.max_memory_allocated() - before
    activity = [torch.profiler.ProfilerActivity.CPU]
    with (
        _quiet(),
        _memory.left_to_torch(),
        torch.profiler.profile(activities=activity, profile_memory=True) as profile,
    ):
        _time(loss, logits, *rest)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def _time(loss: Callable, logits: Tensor, *rest) -> tuple[float, float]:
    """(milliseconds of forward and backward, value)."""
    leaf = logits.detach().clone().requires_grad_()
    wait = torch.cuda.synchronize if logits.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    value = loss(leaf, *rest)
    value.backward()
    wait()
    return 1e3 * (time.perf_counter() - start), value.item()


@contextmanager
def _quiet():
    """Silence what the profiler's C++ code writes to stderr."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
