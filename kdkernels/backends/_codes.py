"""What the compiled backends pass to their kernels in the same way: codes, addresses, strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}
DIVERGENCE = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
REDUCTION = {"none": 0, "mean": 1, "sum": 2, "batchmean": 3}

# The numbers of a CTC kernel, in its order: ctc_weight, kd_weight, temperature,
# teacher_temperature, divergence, beta, rescale. These are of a loss without a teacher.
CTC_ALONE = (1.0, 0.0, 1.0, 1.0, DIVERGENCE["forward_kl"], 0.5, False)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def frames(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides, in elements, of a [T, N, ...] tensor."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def dtype_code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE[tensor.dtype]


def float_dtype(*logits: Tensor) -> torch.dtype:
    """Of the losses, and of the arithmetic."""
    for x in logits:
        if x.dtype is torch.float64:
            return torch.float64
    return torch.float32


def gradient_of(logits: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Memory for a gradient, laid out as the logits where the last stride is 1 then too."""
    gradient = torch.empty_like(logits, device=device)
    if gradient.stride(-1) != 1 and logits.shape[-1] > 1:  # logits that overlap themselves
        return torch.empty(tuple(logits.shape), dtype=logits.dtype, device=gradient.device)
    return gradient


def merged_dims(shape: tuple[int, ...], tensors: list[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes of the leading dimensions `shape` and their strides in each tensor, neighbours merged
    where they are one to all of them."""
    if all(x.is_contiguous() for x in tensors):
        rows = math.prod(shape)
        return [rows], [[x.numel() // max(rows, 1)] for x in tensors]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        here = [x.stride(dim) for x in tensors]
        if sizes and all(s[-1] == n * size for s, n in zip(strides, here, strict=True)):
            sizes[-1] *= size
            for s, n in zip(strides, here, strict=True):
                s[-1] = n
        else:
            sizes.append(size)
            for s, n in zip(strides, here, strict=True):
                s.append(n)
    return sizes, strides
