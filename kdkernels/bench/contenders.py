"""What is compared: this package, eager torch, torch.compile, installed peers, and a plain copy.

Every step is one training step as the loss sees it: raw logits in, the summed loss, `backward()`,
and a gradient tensor that did not exist before. `new` is this package without the memory that it
keeps from gradient to gradient. ctc_align has no gradient: its step is the call.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kdkernels as kd

from . import peers
from .shapes import COPIES, Shape

try:
    from kdkernels import _memory
except ImportError:  # `compare` runs this file with packages that kept no memory yet
    _memory = None

TEMPERATURE = 2.0
BETA = 0.5  # of the Jensen-Shannon divergence


class Inputs(NamedTuple):
    student: torch.Tensor  # [T, N, C], or [rows, C] for kd_loss; requires grad
    teacher: torch.Tensor
    targets: torch.Tensor | None  # [N, S], labels 1 to C-1; blank is 0
    input_lengths: torch.Tensor | None  # [N]
    target_lengths: torch.Tensor | None  # [N]
    frames: torch.Tensor | None  # bool [T, N], frames that count
    divergence: str = "forward_kl"

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
        return Inputs(student, teacher, None, None, None, None, shape.divergence)
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
    return kd.kd_loss(
        x, i.teacher, temperature=TEMPERATURE, divergence=i.divergence, beta=BETA,
        reduction=reduction, backend=backend,
    )  # fmt: skip


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
    log_q = F.log_softmax(x / TEMPERATURE, -1)
    if i.divergence == "forward_kl":
        p = F.softmax(i.teacher / TEMPERATURE, -1)
        return F.kl_div(log_q, p, reduction=reduction) * TEMPERATURE**2
    log_p = F.log_softmax(i.teacher / TEMPERATURE, -1)
    if i.divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction=reduction, log_target=True) * TEMPERATURE**2
    log_m = (BETA * log_p.exp() + (1 - BETA) * log_q.exp()).log()
    of_teacher = F.kl_div(log_m, log_p, reduction=reduction, log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction=reduction, log_target=True)
    return (BETA * of_teacher + (1 - BETA) * of_student) * TEMPERATURE**2


def eager_ctc(i: Inputs, x, reduction="mean"):
    # torch's CTC takes no half precision; its autocast makes float32 of it too
    log_p = F.log_softmax(x, -1, dtype=torch.float32 if x.dtype.itemsize == 2 else None)
    return F.ctc_loss(log_p, i.targets, i.input_lengths, i.target_lengths, reduction=reduction)


def eager_ctc_kd(i: Inputs, x, reduction="mean"):
    per_frame = eager_kd(i, x, "none").sum(-1)
    kl = (per_frame * i.frames).sum()
    if reduction == "mean":
        kl = kl / i.frames.sum()
    return 0.5 * eager_ctc(i, x, reduction) + 0.5 * kl


OURS = {"kd_loss": ours_kd, "ctc_loss": ours_ctc, "ctc_kd_loss": ours_ctc_kd}
EAGER = {"kd_loss": eager_kd, "ctc_loss": eager_ctc, "ctc_kd_loss": eager_ctc_kd}

# torch.compile leaves torch's CTC as it is. What it can fuse, the log_softmax, takes a share of the
# time from this many classes on; below, it would be eager torch twice.
COMPILED_CTC_CLASSES = 1000


def compiled(loss: Callable, device: str) -> Callable:
    torch._dynamo.reset()
    mode = "max-autotune" if device == "cuda" else None
    return torch.compile(loss, dynamic=False, mode=mode)


def loss_table(shape: Shape, backend: str | None = None, device: str = "cpu"):
    """Name -> () -> the loss, made or compiled only when it is wanted; `ours` first."""
    op = shape.op
    table = {
        "ours": lambda: partial(OURS[op], backend=backend),
        "eager": lambda: EAGER[op],
    }
    if op != "ctc_loss" or shape.C >= COMPILED_CTC_CLASSES:
        table["compile"] = lambda: compiled(EAGER[op], device)
    if op == "kd_loss":
        table["trl"] = lambda: partial(peers.trl_divergence, temperature=TEMPERATURE, beta=BETA)
        table["liger"] = lambda: partial(peers.liger_divergence, temperature=TEMPERATURE, beta=BETA)
    if op == "ctc_kd_loss":
        table["separate"] = lambda: partial(separate_ctc_kd, backend=backend)
    return table


def align_table(backend: str | None = None):
    """Name -> (inputs) -> (paths [N, T], scores [N])."""

    def ours(i: Inputs, backend=backend):
        return kd.ctc_align(
            i.student.detach(), i.targets, i.input_lengths, i.target_lengths, backend=backend
        )

    return {
        "ours": ours,
        "reference": partial(ours, backend="reference"),
        "torchaudio": peers.torchaudio_align,
    }


class Contender(NamedTuple):
    step: Callable[[], object]  # what is timed
    # () -> summed loss and its gradient in float64, or None where there is none
    result: Callable[[], tuple[torch.Tensor, torch.Tensor | None]] | None = None
    peak: int | None = None  # bytes that a step needs, where the compiler knows them


def evaluate(loss: Callable, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and its gradient, in float64.

    Summed, so that the gradient of a frame has its natural size, up to 1.
    """
    inputs.student.grad = None
    value = loss(inputs, inputs.student, reduction="sum")
    value.backward()
    return value.detach().double(), inputs.student.grad.double()


def step_of(
    loss: Callable, inputs: Inputs, new_memory: bool = False, **options
) -> Callable[[], None]:
    """Forward and backward, into a fresh gradient; with `new_memory` as in a first step."""

    def step():
        inputs.student.grad = None
        if new_memory:
            kd.empty_cache()
        loss(inputs, inputs.student, **options).backward()

    return step


def loss_contender(make: Callable, inputs: Inputs) -> Contender:
    loss = make()
    return Contender(step_of(loss, inputs, reduction="sum"), partial(evaluate, loss, inputs))


def keeps_memory(size: int) -> bool:
    return _memory is not None and _memory.keeps(size)


def new_memory_contender(shape: Shape, inputs: Inputs, backend: str | None) -> Contender:
    loss = partial(OURS[shape.op], backend=backend)
    return Contender(step_of(loss, inputs, new_memory=True, reduction="sum"))


def optax_contender(inputs: Inputs) -> Contender:
    step, peak = peers.optax_ctc(inputs)
    return Contender(step, lambda: peers.optax_result(step()), peak)


def align_contender(align: Callable, inputs: Inputs) -> Contender:
    return Contender(partial(align, inputs), lambda: (align(inputs)[1].double().sum(), None))


def copy_contender(inputs: Inputs, tensors: float) -> Contender:
    """Copy `tensors` logit tensors into new memory, obtained as this package obtains its own."""
    x = inputs.student.detach().flatten()
    parts = [x] * int(tensors)
    if tensors % 1:
        parts.append(x[: int(x.numel() * (tensors % 1))])

    def copy(x: torch.Tensor) -> torch.Tensor:
        if not keeps_memory(x.nbytes):
            return x.clone()
        return _memory.empty(tuple(x.shape), x.stride(), x.dtype).copy_(x)

    def step():
        kd.empty_cache()
        return [copy(part) for part in parts] and None

    return Contender(step)


def contenders(
    shape: Shape,
    inputs: Inputs,
    backend: str | None = None,
    compile: bool = True,
    only: tuple[str, ...] = (),
    failed: dict[str, str] | None = None,
) -> dict[str, Contender]:
    """Name -> contender, `ours` first, of those that run here. Without `compile`, those that take
    long to compile are left out; `only` names the few that are wanted.

    Each peer runs once. What it raises is an error, or is noted in `failed`, where that is given: a
    fault in another library costs only its own figures.
    """
    device = inputs.student.device.type
    if shape.op == "ctc_align":
        table = {
            name: partial(align_contender, align, inputs)
            for name, align in align_table(backend).items()
        }
    else:
        table = {
            name: partial(loss_contender, make, inputs)
            for name, make in loss_table(shape, backend, device).items()
        }
    if shape.op in OURS and keeps_memory(4 * shape.numel):
        table["new"] = partial(new_memory_contender, shape, inputs, backend)
    forward_kl = shape.op == "kd_loss" and shape.divergence == "forward_kl"
    if forward_kl and shape.C <= peers.MOST_FLA_CLASSES:
        make = partial(peers.fla_kl, inputs, TEMPERATURE)
        table["fla"] = partial(loss_contender, make, inputs)
    if shape.op == "ctc_loss":
        table["optax"] = partial(optax_contender, inputs)
        table["k2"] = partial(loss_contender, partial(peers.k2_ctc, inputs), inputs)
    table["copy"] = partial(copy_contender, inputs, COPIES[shape.op])
    skipped = () if compile else ("compile", "optax")
    found = {}
    for name, make in table.items():
        if name in skipped or (only and name not in only):
            continue
        if name not in peers.PEERS:
            found[name] = make()
        elif peers.runs(name, device):
            try:
                rival = make()
                rival.step()
                found[name] = rival
            except Exception as error:  # whatever another library may raise
                if failed is None:
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found
