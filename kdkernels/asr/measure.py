"""What the distillation loss of one training step costs: these ops and torch's own, in turn."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

from .batches import Batch
from .settings import Settings


def fused(logits: Tensor, lengths: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """The loss of the distilled student. `logits` [N, T, C], `lengths` [N]."""
    return kd.ctc_kd_loss(
        logits,
        batch.teacher_logits,
        batch.targets,
        lengths,
        batch.target_lengths,
        zero_infinity=True,
        ctc_weight=settings.ctc_weight,
        kd_weight=settings.kd_weight,
        temperature=settings.temperature,
        labelled=batch.labelled,
        batch_first=True,
    ).loss


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
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    valid = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    kl = (divergence * valid).sum() / valid.sum() * settings.temperature**2
    return settings.ctc_weight * ctc + settings.kd_weight * kl


def compare(
    logits: Tensor, lengths: Tensor, batch: Batch, settings: Settings, runs: int = 31
) -> dict[str, float]:
    """Medians, in milliseconds, of loss and gradient; the relative difference of the two losses."""
    times: dict[str, list[float]] = {"fused": [], "torch": []}
    losses = {}
    for _ in range(runs):
        for name, loss in (("fused", fused), ("torch", composite)):
            milliseconds, losses[name] = _time(loss, logits, lengths, batch, settings)
            times[name].append(milliseconds)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    difference = abs(losses["fused"] - losses["torch"]) / max(abs(losses["torch"]), 1e-9)
    return {**medians, "speedup": medians["torch"] / medians["fused"], "difference": difference}


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
