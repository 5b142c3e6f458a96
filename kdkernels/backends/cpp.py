"""The compiled kernels (csrc/): passes sizes, strides and addresses of CPU tensors to ``_C``.

Every argument was checked by the public function. What is done here is allocation; results come
back as the backend contract in ``backends/__init__.py`` says.
"""

from __future__ import annotations

import os
from array import array

import torch
from torch import Tensor

from kdkernels import _C

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss", "ctc_posteriors", "ctc_align")

# The instruction set: the best one that this machine has, or the one asked for (to try another).
TARGET = os.environ.get("KDKERNELS_TARGET") or _C.best_target
if TARGET not in _C.targets:
    raise ImportError(
        f"kdkernels: expected KDKERNELS_TARGET to be one of {tuple(_C.targets)}, got {TARGET!r}"
    )
_kernels = getattr(_C, TARGET)

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DIVERGENCE = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_REDUCTION = {"none": 0, "mean": 1, "sum": 2, "batchmean": 3}


def supports(op: str, device_type: str) -> bool:
    return op in OPS and device_type == "cpu"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float_dtype(*logits: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _row_layout(tensors: list[Tensor]) -> array:
    """Sizes of the leading dimensions, then their strides in each tensor, merged where possible."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim in range(tensors[0].dim() - 1):
        size = tensors[0].shape[dim]
        if size == 1:
            continue
        if sizes and all(s[-1] == x.stride(dim) * size for s, x in zip(strides, tensors)):
            sizes[-1] *= size
            for s, x in zip(strides, tensors):
                s[-1] = x.stride(dim)
        else:
            sizes.append(size)
            for s, x in zip(strides, tensors):
                s.append(x.stride(dim))
    return array("q", sizes + [n for s in strides for n in s])


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
    dtype = _float_dtype(student_logits, teacher_logits)
    if weight is not None:
        weight = weight.to(dtype).expand(shape).contiguous()
    grad_student = torch.empty_like(student_logits) if student_grad else None
    grad_teacher = torch.empty_like(teacher_logits) if teacher_grad else None
    layout = _row_layout(
        [
            student_logits,
            teacher_logits,
            student_logits if grad_student is None else grad_student,
            teacher_logits if grad_teacher is None else grad_teacher,
        ]
    )
    row_loss = torch.empty(shape, dtype=dtype)
    loss = row_loss if reduction == "none" else torch.empty((), dtype=dtype)
    threads = torch.get_num_threads()
    workspace = _workspace(_kernels.kd_loss_workspace(C, threads))
    _kernels.kd_loss_forward(
        rows,
        C,
        shape[0] if shape else 1,
        len(layout) // 5,
        layout.buffer_info()[0],
        student_logits.data_ptr(),
        _DTYPE[student_logits.dtype],
        teacher_logits.data_ptr(),
        _DTYPE[teacher_logits.dtype],
        _address(weight),
        temperature,
        teacher_temperature,
        _DIVERGENCE[divergence],
        beta,
        _REDUCTION[reduction],
        rescale,
        loss.data_ptr(),
        _address(grad_student),
        _address(grad_teacher),
        row_loss.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    return loss, grad_student, grad_teacher
