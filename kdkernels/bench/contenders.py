"""What is compared: this package, eager torch, torch.compile, installed peers, and a plain copy.

Every step is one training step as the loss sees it: raw logits in, `backward()`, and a gradient
tensor that did not exist before.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kdkernels as kd

from . import peers
from .shapes import Shape

TEMPERATURE = 2.0


class Inputs(NamedTuple):
    student: torch.Tensor  # [T, N, C], or [rows, C] for kd_loss; requires grad
    teacher: torch.Tensor
    targets: torch.Tensor | None  # [N, S], labels 1 to C-1; blank is 0
    input_lengths: torch.Tensor | None  # [N]
    target_lengths: torch.Tensor | None  # [N]
    frames: torch.Tensor | None  # bool [T, N], frames that count

    def to(self, dtype: torch.dtype) -> "Inputs":
        student = self.student.detach().to(dtype, copy=True).requires_grad_()
        return self._replace(student=student, teacher=self.teacher.to(dtype))


def make_inputs(shape: Shape, dtype=torch.float32, device="cpu", seed=0) -> Inputs:
    """Random logits and targets; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    size = (shape.N, shape.C) if shape.op == "kd_loss" else (shape.T, shape.N, shape.C)
    student = torch.randn(size, generator=g).to(device, dtype).requires_grad_()
    teacher = torch.randn(size, generator=g).mul_(2).to(device, dtype)
    if shape.op == "kd_loss":
        return Inputs(student, teacher, None, None, None, None)
    T, N, C, S = shape.T, shape.N, shape.C, shape.S
    targets = torch.randint(1, C, (N, S), generator=g)
    target_lengths = torch.full((N,), S)
    input_lengths = torch.full((N,), T)
    if shape.varying:
        target_lengths = torch.randint(S // 2, S + 1, (N,), generator=g)
        input_lengths = torch.randint(T // 2, T + 1, (N,), generator=g)
        input_lengths = torch.maximum(input_lengths, 2 * target_lengths)
        input_lengths[0], target_lengths[0] = T, S
    frames = torch.arange(T)[:, None] < input_lengths
    rest = (x.to(device) for x in (targets, input_lengths, target_lengths, frames))
    return Inputs(student, teacher, *rest)


# ---- losses: (inputs, student logits, reduction) -> the loss that backward() is called on


def ours_kd(i: Inputs, x, reduction="batchmean", backend=None):
    return kd.kd_loss(x, i.teacher, temperature=TEMPERATURE, reduction=reduction, backend=backend)


def ours_ctc(i: Inputs, x, reduction="mean", backend=None):
    return kd.ctc_loss(
        x, i.targets, i.input_lengths, i.target_lengths, reduction=reduction, backend=backend
    )


def ours_ctc_kd(i: Inputs, x, reduction="mean", backend=None):
    return kd.ctc_kd_loss(
        x, i.teacher, i.targets, i.input_lengths, i.target_lengths,
        reduction=reduction, kd_weight=0.5, temperature=TEMPERATURE, backend=backend,
    ).loss  # fmt: skip


def separate_ctc_kd(i: Inputs, x, reduction="mean", backend=None):
    """This package's two losses one after the other."""
    kl = kd.kd_loss(
        x, i.teacher, temperature=TEMPERATURE, weight=i.frames, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    return 0.5 * ours_ctc(i, x, reduction, backend) + 0.5 * kl


def eager_kd(i: Inputs, x, reduction="batchmean"):
    log_p = F.log_softmax(x / TEMPERATURE, -1)
    q = F.softmax(i.teacher / TEMPERATURE, -1)
    return F.kl_div(log_p, q, reduction=reduction) * TEMPERATURE**2


def eager_ctc(i: Inputs, x, reduction="mean"):
    log_p = F.log_softmax(x, -1)
    return F.ctc_loss(log_p, i.targets, i.input_lengths, i.target_lengths, reduction=reduction)


def eager_ctc_kd(i: Inputs, x, reduction="mean"):
    per_frame = eager_kd(i, x, "none").sum(-1)
    kl = (per_frame * i.frames).sum()
    if reduction == "mean":
        kl = kl / i.frames.sum()
    return 0.5 * eager_ctc(i, x, reduction) + 0.5 * kl


OURS = {"kd_loss": ours_kd, "ctc_loss": ours_ctc, "ctc_kd_loss": ours_ctc_kd}
EAGER = {"kd_loss": eager_kd, "ctc_loss": eager_ctc, "ctc_kd_loss": eager_ctc_kd}

# Logit tensors that a copy must move to equal the least traffic of the operator: 3 V read or
# written are 1.5 copies. CTC is held to 3 copies.
COPIES = {"kd_loss": 1.5, "ctc_loss": 3.0, "ctc_kd_loss": 3.0}


def step_of(loss: Callable, inputs: Inputs) -> Callable[[], None]:
    """Forward and backward, into a fresh gradient."""

    def step():
        inputs.student.grad = None
        loss(inputs, inputs.student).backward()

    return step


def copy_step(inputs: Inputs, tensors: float) -> Callable[[], None]:
    """Copy `tensors` logit tensors into fresh memory."""
    x = inputs.student.detach().flatten()
    parts = [x] * int(tensors)
    if tensors % 1:
        parts.append(x[: int(x.numel() * (tensors % 1))])

    def step():
        return [p.clone() for p in parts] and None

    return step


def contenders(
    shape: Shape, inputs: Inputs, backend: str | None = None, compiled: bool = True
) -> dict[str, Callable[[], None]]:
    """Name -> step, `ours` first."""

    def ours(fn):
        return step_of(lambda i, x: fn(i, x, backend=backend), inputs)

    steps = {"ours": ours(OURS[shape.op]), "eager": step_of(EAGER[shape.op], inputs)}
    if shape.op == "kd_loss" and compiled:
        torch._dynamo.reset()
        steps["compile"] = step_of(torch.compile(eager_kd, dynamic=False), inputs)
    if shape.op == "ctc_kd_loss":
        steps["separate"] = ours(separate_ctc_kd)
    if shape.op == "ctc_loss" and compiled and peers.installed()["optax"]:
        steps["optax"] = peers.optax_ctc(inputs, "mean")
    steps["copy"] = copy_step(inputs, COPIES[shape.op])
    return steps
