"""The compiled kernels (csrc/): passes sizes, strides and addresses of CPU tensors to ``_C``.

Every argument was checked by the public function. What is done here is allocation; results come
back as the backend contract in ``backends/__init__.py`` says.
"""

from __future__ import annotations

import os
from array import array
from itertools import chain

import torch
from torch import Tensor

from kdkernels import _C, _memory
from kdkernels.backends._codes import (
    CTC_ALONE,
    DIVERGENCE,
    DTYPE,
    REDUCTION,
    address,
    dtype_code,
    float_dtype,
    frames,
    gradient_of,
    merged_dims,
)

# The instruction set: the best one that this machine has, or the one asked for (to try another).
TARGET = os.environ.get("KDKERNELS_TARGET") or _C.best_target
if TARGET not in _C.targets:
    raise ImportError(
        f"kdkernels: expected KDKERNELS_TARGET to be one of {tuple(_C.targets)}, got {TARGET!r}"
    )
_kernels = getattr(_C, TARGET)


def supports(device_type: str) -> bool:
    return device_type == "cpu"


def _workspace(logits: Tensor, size: int) -> Tensor:
    return logits.new_empty(size, dtype=torch.uint8)


def _gradient_of(logits: Tensor) -> Tensor:
    if not _memory.keeps(logits.nbytes):
        return gradient_of(logits)
    layout = gradient_of(logits, device="meta")
    return _memory.empty(tuple(layout.shape), layout.stride(), layout.dtype)


def scale_grad_(grad: Tensor, grad_loss: Tensor) -> Tensor:
    if grad_loss.dim() == 0:
        return grad if grad_loss.item() == 1 else grad.mul_(grad_loss)
    if (grad_loss == 1).all():
        return grad
    return grad.mul_(grad_loss.unsqueeze(-1))  # a dim of its own: the factor keeps its float32


def kd_loss_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    divergence: str,
    beta: float,
    reduction: str,
    rescale: bool,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    *shape, C = student_logits.shape
    rows = student_logits.numel() // C
    dtype = float_dtype(student_logits, teacher_logits)
    if weight is not None:
        weight = weight.to(dtype).expand(shape).contiguous()
    grad_student = _gradient_of(student_logits) if student_grad else None
    grad_teacher = _gradient_of(teacher_logits) if teacher_grad else None
    sizes, strides = merged_dims(
        tuple(shape),
        [
            student_logits,
            teacher_logits,
            student_logits if grad_student is None else grad_student,
            teacher_logits if grad_teacher is None else grad_teacher,
        ],
    )
    layout = array("q", chain(sizes, *strides))
    loss = student_logits.new_empty(shape if reduction == "none" else (), dtype=dtype)
    threads = torch.get_num_threads()
    size = _kernels.kd_loss_workspace(rows, C, dtype is torch.float64, threads)
    workspace = _workspace(student_logits, size)
    _kernels.kd_loss_forward(
        rows,
        C,
        shape[0] if shape else 1,
        len(sizes),
        layout.buffer_info()[0],
        student_logits.data_ptr(),
        DTYPE[student_logits.dtype],
        teacher_logits.data_ptr(),
        DTYPE[teacher_logits.dtype],
        address(weight),
        temperature,
        teacher_temperature,
        DIVERGENCE[divergence],
        beta,
        REDUCTION[reduction],
        rescale,
        loss.data_ptr(),
        address(grad_student),
        address(grad_teacher),
        workspace.data_ptr(),
        threads,
    )
    return loss, grad_student, grad_teacher


class _Labels:
    """Targets and lengths as the kernels take them: int64, and where each target begins."""

    def __init__(self, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> None:
        self.input_lengths = input_lengths.to("cpu", torch.int64).contiguous()
        self.target_lengths = target_lengths.to("cpu", torch.int64).contiguous()
        self.targets = targets.to("cpu", torch.int64).contiguous()
        if targets.dim() == 2:
            N, self.longest = targets.shape
            self.offsets = torch.arange(N, device="cpu").mul_(self.longest)
        else:
            self.longest = int(self.target_lengths.max()) if len(self.target_lengths) else 0
            self.offsets = self.target_lengths.cumsum(0) - self.target_lengths

    def addresses(self) -> tuple[int, ...]:
        tensors = (self.targets, self.offsets, self.input_lengths, self.target_lengths)
        return tuple(x.data_ptr() for x in tensors)


def _ctc(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: str,
    zero_infinity: bool,
    losses: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor | None,
    *,
    posteriors: bool = False,
    teacher: Tensor | None = None,
    grad_teacher: Tensor | None = None,
    labelled: Tensor | None = None,
    frame_weight: Tensor | None = None,
    numbers: tuple[float, ...] = CTC_ALONE,
) -> None:
    T, N, C = logits.shape
    labels = _Labels(targets, input_lengths, target_lengths)
    S = labels.longest
    threads = torch.get_num_threads()
    wide = float_dtype(logits, logits if teacher is None else teacher) is torch.float64
    workspace = _workspace(logits, _kernels.ctc_loss_workspace(T, N, C, S, wide, threads))
    _kernels.ctc_loss_forward(
        T,
        N,
        C,
        S,
        logits.data_ptr(),
        DTYPE[logits.dtype],
        logits.stride(0),
        logits.stride(1),
        *labels.addresses(),
        blank,
        REDUCTION[reduction],
        zero_infinity,
        posteriors,
        address(teacher),
        dtype_code(teacher),
        0 if teacher is None else teacher.stride(0),
        0 if teacher is None else teacher.stride(1),
        address(labelled),
        address(frame_weight),
        *numbers,
        *(address(x) for x in losses),
        *frames(grad),
        *frames(grad_teacher),
        workspace.data_ptr(),
        threads,
    )


def ctc_loss_forward(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: str,
    zero_infinity: bool,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:
    shape = (logits.shape[1],) if reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=float_dtype(logits))
    gradient = _gradient_of(logits) if grad else None
    _ctc(
        logits,
        targets,
        input_lengths,
        target_lengths,
        blank,
        reduction,
        zero_infinity,
        (loss, None, None),
        gradient,
    )
    return loss, gradient


def ctc_kd_loss_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    labelled: Tensor | None,
    frame_weight: Tensor | None,
    blank: int,
    reduction: str,
    zero_infinity: bool,
    ctc_weight: float,
    kd_weight: float,
    temperature: float,
    teacher_temperature: float,
    divergence: str,
    beta: float,
    rescale: bool,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    T, N, _ = student_logits.shape
    dtype = float_dtype(student_logits, teacher_logits)
    shape = (N,) if reduction == "none" else ()
    loss, ctc, kd = (student_logits.new_empty(shape, dtype=dtype) for _ in range(3))
    grad_student = _gradient_of(student_logits) if student_grad else None
    grad_teacher = _gradient_of(teacher_logits) if teacher_grad else None
    if labelled is not None:
        labelled = labelled.to("cpu", torch.bool).contiguous()
    if frame_weight is not None:
        frame_weight = frame_weight.to(dtype).expand(T, N).contiguous()
    _ctc(
        student_logits,
        targets,
        input_lengths,
        target_lengths,
        blank,
        reduction,
        zero_infinity,
        (loss, ctc, kd),
        grad_student,
        teacher=teacher_logits,
        grad_teacher=grad_teacher,
        labelled=labelled,
        frame_weight=frame_weight,
        numbers=(
            ctc_weight,
            kd_weight,
            temperature,
            teacher_temperature,
            DIVERGENCE[divergence],
            beta,
            rescale,
        ),
    )
    return loss, ctc, kd, grad_student, grad_teacher


def ctc_posteriors(
    logits: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    occupancy = logits.new_empty(logits.shape, dtype=float_dtype(logits))
    _ctc(
        logits,
        targets,
        input_lengths,
        target_lengths,
        blank,
        "none",
        True,
        (None, None, None),
        occupancy,
        posteriors=True,
    )
    return occupancy


def ctc_align(
    logits: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    T, N, C = logits.shape
    labels = _Labels(targets, input_lengths, target_lengths)
    paths = logits.new_empty((N, T), dtype=torch.int64)
    scores = logits.new_empty(N, dtype=float_dtype(logits))
    threads = torch.get_num_threads()
    wide = scores.dtype is torch.float64
    size = _kernels.ctc_align_workspace(T, N, C, labels.longest, wide, threads)
    workspace = _workspace(logits, size)
    _kernels.ctc_align(
        T,
        N,
        C,
        labels.longest,
        logits.data_ptr(),
        DTYPE[logits.dtype],
        logits.stride(0),
        logits.stride(1),
        *labels.addresses(),
        blank,
        paths.data_ptr(),
        scores.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    return paths, scores
