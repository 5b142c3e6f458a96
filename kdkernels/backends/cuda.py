"""The compiled kernels of a GPU (csrc/cuda/): passes sizes, strides and addresses of tensors on its
device, and the current stream, to ``_C.cuda``.

Every argument was checked by the public function, except values that lie on the device: those are
read there. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from array import array
from itertools import chain

import torch
from torch import Tensor

from kdkernels import _C
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

DEVICE_TYPE = "cuda"

_kernels = getattr(_C, "cuda", None)  # None: built without

_BYTES = {torch.int64: 8, torch.int32: 4, torch.int16: 2, torch.int8: 1, torch.uint8: -1}
_MOST_DIMS = 8  # of the rows' layout, in the kernels


def supports(device_type: str) -> bool:
    if _kernels is None or device_type != DEVICE_TYPE:
        return False
    return DEVICE_TYPE != "cuda" or _compiled_for_every_gpu()


@functools.cache
def _compiled_for_every_gpu() -> bool:
    """Of those that this process sees; the kernels need sm_80. (ROCm calls its GPUs cuda too.)"""
    gpus = range(torch.cuda.device_count())
    return torch.version.hip is None and all(
        torch.cuda.get_device_capability(i) >= (8, 0) for i in gpus
    )


def _place(device: torch.device) -> tuple[int, int]:
    """Index of the device and address of its current stream."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _row_layout(shape: torch.Size, tensors: list[Tensor]) -> tuple[int, array]:
    """The number of leading dimensions that are left when they are merged; their sizes, then their
    strides in each tensor."""
    sizes, strides = merged_dims(shape, tensors)
    if len(sizes) > _MOST_DIMS:
        raise NotImplementedError(f"logits of more than {_MOST_DIMS} dims that cannot be merged")
    return len(sizes), array("q", chain(sizes, *strides))


def scale_grad_(grad: Tensor, grad_loss: Tensor) -> Tensor:
    shape, C = grad.shape[:-1], grad.shape[-1]
    factor = grad_loss.expand(shape)
    dims, layout = _row_layout(shape, [grad, factor])
    _kernels.scale_grad(
        grad.numel() // C,
        C,
        dims,
        layout.buffer_info()[0],
        grad.data_ptr(),
        DTYPE[grad.dtype],
        factor.data_ptr(),
        DTYPE[factor.dtype],
        *_place(grad.device),
    )
    return grad


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
    device = student_logits.device
    dtype = float_dtype(student_logits, teacher_logits)
    grad_student = gradient_of(student_logits) if student_grad else None
    grad_teacher = gradient_of(teacher_logits) if teacher_grad else None
    dims, layout = _row_layout(
        student_logits.shape[:-1],
        [
            student_logits,
            teacher_logits,
            student_logits if grad_student is None else grad_student,
            teacher_logits if grad_teacher is None else grad_teacher,
            student_logits if weight is None else weight,
        ],
    )
    loss = torch.empty(shape if reduction == "none" else (), dtype=dtype, device=device)
    workspace = _workspace(_kernels.kd_loss_workspace(rows), device)
    _kernels.kd_loss_forward(
        rows,
        C,
        shape[0] if shape else 1,
        dims,
        layout.buffer_info()[0],
        student_logits.data_ptr(),
        DTYPE[student_logits.dtype],
        teacher_logits.data_ptr(),
        DTYPE[teacher_logits.dtype],
        address(weight),
        dtype_code(weight),
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
        *_place(device),
    )
    return loss, grad_student, grad_teacher


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


class _Problem:
    """What every CTC kernel takes: sizes, strides, logits, targets and lengths."""

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        input_lengths: Tensor,
        target_lengths: Tensor,
        blank: int,
    ) -> None:
        self.device = logits.device
        # Kept alive until the kernels are launched.
        self.tensors = [
            x if x.device == self.device else x.to(self.device, non_blocking=True)
            for x in (targets, input_lengths, target_lengths)
        ]
        targets, input_lengths, target_lengths = self.tensors
        padded = targets.dim() == 2
        longest = targets.shape[1] if padded else targets.shape[0]
        self.sizes = array("q", [*logits.shape, longest, targets.numel()])
        self.strides = array(
            "q",
            [
                targets.stride(0) if padded else -1,
                targets.stride(-1),
                input_lengths.stride(0),
                target_lengths.stride(0),
            ],
        )
        self.shape = (self.sizes.buffer_info()[0], self.strides.buffer_info()[0])
        integers = [y for x in self.tensors for y in (x.data_ptr(), _BYTES[x.dtype])]
        self.arguments = (
            *self.shape,
            logits.data_ptr(),
            DTYPE[logits.dtype],
            logits.stride(0),
            logits.stride(1),
            *integers,
            blank,
        )


def _ctc(
    problem: _Problem,
    reduction: str,
    zero_infinity: bool,
    losses: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor | None,
    wide: bool,
    *,
    posteriors: bool = False,
    teacher: Tensor | None = None,
    grad_teacher: Tensor | None = None,
    labelled: Tensor | None = None,
    frame_weight: Tensor | None = None,
    numbers: tuple[float, ...] = CTC_ALONE,
) -> None:
    workspace = _workspace(_kernels.ctc_loss_workspace(*problem.shape, wide), problem.device)
    teacher_data, *teacher_strides = frames(teacher)
    weight_data, *weight_strides = frames(frame_weight)
    _kernels.ctc_loss_forward(
        *problem.arguments,
        REDUCTION[reduction],
        zero_infinity,
        posteriors,
        teacher_data,
        dtype_code(teacher),
        *teacher_strides,
        address(labelled),
        weight_data,
        dtype_code(frame_weight),
        *weight_strides,
        *numbers,
        *(address(x) for x in losses),
        *frames(grad),
        *frames(grad_teacher),
        workspace.data_ptr(),
        *_place(problem.device),
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
    problem = _Problem(logits, targets, input_lengths, target_lengths, blank)
    shape = (logits.shape[1],) if reduction == "none" else ()
    dtype = float_dtype(logits)
    loss = torch.empty(shape, dtype=dtype, device=logits.device)
    gradient = gradient_of(logits) if grad else None
    wide = dtype == torch.float64
    _ctc(problem, reduction, zero_infinity, (loss, None, None), gradient, wide)
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
    problem = _Problem(student_logits, targets, input_lengths, target_lengths, blank)
    device = student_logits.device
    dtype = float_dtype(student_logits, teacher_logits)
    shape = (student_logits.shape[1],) if reduction == "none" else ()
    loss, ctc, kd = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    grad_student = gradient_of(student_logits) if student_grad else None
    grad_teacher = gradient_of(teacher_logits) if teacher_grad else None
    if labelled is not None:
        labelled = labelled.to(device, torch.bool, non_blocking=True).contiguous()
    _ctc(
        problem,
        reduction,
        zero_infinity,
        (loss, ctc, kd),
        grad_student,
        dtype == torch.float64,
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
    problem = _Problem(logits, targets, input_lengths, target_lengths, blank)
    dtype = float_dtype(logits)
    occupancy = torch.empty(tuple(logits.shape), dtype=dtype, device=logits.device)
    wide = dtype == torch.float64
    _ctc(problem, "none", True, (None, None, None), occupancy, wide, posteriors=True)
    return occupancy


def ctc_align(
    logits: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    T, N, _ = logits.shape
    problem = _Problem(logits, targets, input_lengths, target_lengths, blank)
    dtype = float_dtype(logits)
    paths = torch.empty((N, T), dtype=torch.int64, device=logits.device)
    scores = torch.empty((N,), dtype=dtype, device=logits.device)
    wide = dtype == torch.float64
    workspace = _workspace(_kernels.ctc_align_workspace(*problem.shape, wide), logits.device)
    _kernels.ctc_align(
        *problem.arguments,
        paths.data_ptr(),
        scores.data_ptr(),
        workspace.data_ptr(),
        *_place(logits.device),
    )
    return paths, scores
