"""ctc_loss, ctc_kd_loss and ctc_posteriors: four kernels, workspace between them, no wait for the
device."""

import torch
import triton

from kdkernels.backends._codes import float_dtype, gradient_of

from .common import (
    GROUP,
    INTERPRETED,
    LARGEST_ROW,
    TILE,
    as_bytes,
    on_its_device,
    tile_of,
    tl_dtype,
    unit_of,
)
from .ctc_gradient import ctc_gradient_kernel
from .ctc_recursion import ctc_first_kernel, ctc_second_kernel
from .ctc_rows import ctc_rows_kernel
from .divergence import KINDS, is_fast

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class Problem:
    """What the kernels are told of targets and lengths, wherever these were."""

    def __init__(self, logits, targets, input_lengths, target_lengths, labelled=None):
        T, N, _ = logits.shape
        device = logits.device
        self.padded = targets.dim() == 2
        size = targets.shape[-1]
        # Not by T, where the targets' shape tells: other frames must not compile again. It does not
        # of concatenated ones whose lengths lie on the device.
        longest = size if self.padded else min(size, T)
        # One blank more than labels, in whole lanes of up to four neighbours.
        self.width = max(16 if INTERPRETED else 32, triton.next_power_of_2(max(longest, 0) + 1))
        self.lanes = self.width if INTERPRETED else max(32, min(512, self.width // 4))
        self.vectors = self.width // self.lanes
        self.warps = 1 if INTERPRETED else max(1, self.lanes // 32)
        targets, input_lengths, target_lengths = (
            x.to(device, non_blocking=True) for x in (targets, input_lengths, target_lengths)
        )
        if not size:
            targets = targets.new_zeros((N, 1) if self.padded else 1)
        self.size = size
        self.targets = (
            targets,
            targets.stride(0) if self.padded else 0,
            targets.stride(-1),
        )
        self.target_lengths = (target_lengths, target_lengths.stride(0))
        self.input_lengths = (input_lengths, input_lengths.stride(0))
        self.labelled = (None, 0)
        if labelled is not None:
            labelled = as_bytes(labelled.to(device, torch.bool, non_blocking=True))
            self.labelled = (labelled, labelled.stride(0))
        self.flags = (self.padded, labelled is not None)


def frame_strides(x, unit):
    return (0, 0) if x is None else (x.stride(0) // unit, x.stride(1) // unit)


def _ctc(
    problem, logits, blank, reduction, zero_infinity, grad, *, posteriors=False, teacher=None,
    grad_teacher=None, frame_weight=None, ctc_weight=1.0, kd_weight=0.0, temperature=1.0,
    teacher_temperature=1.0, divergence="forward_kl", beta=0.5, rescale=True,
):  # fmt: skip
    """(loss, ctc, kd); the gradients are filled."""
    if not logits.shape[0]:  # one frame that nobody reads
        logits, teacher, grad, grad_teacher = (
            x if x is None else x.new_zeros((1, *x.shape[1:]))
            for x in (logits, teacher, grad, grad_teacher)
        )
    p = problem
    (T, N, C), frame_weight = logits.shape, as_bytes(frame_weight)
    device, dtype = (
        logits.device,
        float_dtype(*([logits] if teacher is None else [logits, teacher])),
    )
    kd = teacher is not None
    shape = (N,) if reduction == "none" else ()
    outputs = [torch.empty(shape, dtype=dtype, device=device) for _ in range(3 if kd else 1)]
    if not N:
        return [x.zero_() for x in outputs]

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    float64, int32 = torch.float64, torch.int32
    top, rest, blank_m = empty(N, T), empty(N, T), empty(N, T)
    blank_e = empty(N, T, dtype=int32)
    label_m, label_e = empty(N, T, p.width), empty(N, T, p.width, dtype=int32)
    half = (T + 1) // 2
    rows_m = empty(2 * N, half, 2, p.width)
    rows_e = empty(2 * N, half, 2, p.width, dtype=int32)
    gamma = empty(N, T, p.width)
    following = empty(N, p.width, dtype=int32)
    head = empty(N, p.width, dtype=torch.int8)
    most, fault, done = empty(N, dtype=int32), empty(N, dtype=int32), empty(1, dtype=int32)
    losses, ctc_factor, kd_factor, weight_sum = (empty(N, dtype=float64) for _ in range(4))

    FLOAT = tl_dtype(dtype)
    unit = unit_of(C, logits, teacher, grad, grad_teacher)
    tile_rows, block_c, warps = tile_of(T, C)
    block_s = min(64, p.width)
    blocks = triton.cdiv(T, tile_rows)
    weights = frame_weight
    weight_args = (weights, *frame_strides(weights, 1))
    ctc_rows_kernel[(N * blocks,)](
        logits, *frame_strides(logits, unit), T, N, C // unit, p.size, blank,
        *p.targets, *p.target_lengths, *p.input_lengths, *p.labelled,
        top, rest, blank_m, blank_e, label_m, label_e, following, head, most, done,
        *p.flags, grad is not None, False, FLOAT, unit, tile_rows, block_c, block_s,
        p.vectors, p.lanes, num_warps=warps,
    )  # fmt: skip
    group = min(GROUP, triton.next_power_of_2(2 * N))
    tables = (blank_m, blank_e, label_m, label_e, rows_m, rows_e, fault)
    lengths = (*p.targets, *p.target_lengths, *p.input_lengths, *p.labelled)
    ctc_first_kernel[(triton.cdiv(2 * N, group),)](
        T, N, p.size, C, blank, *lengths, *tables, *weight_args, weight_sum,
        *p.flags, weights is not None, FLOAT, group, p.lanes, p.vectors, num_warps=p.warps,
    )  # fmt: skip
    ctc_second_kernel[(triton.cdiv(2 * N, group), 1 if grad is None else 2)](
        T, N, p.size, *lengths, *tables, weight_sum, rest, gamma,
        losses, ctc_factor, kd_factor, ctc_weight, kd_weight,
        *p.flags, reduction == "mean", kd, zero_infinity, FLOAT, group, p.lanes, p.vectors,
        num_warps=p.warps,
    )  # fmt: skip
    fast = is_fast(dtype, divergence, temperature, teacher_temperature)
    tile_rows, block_c, warps = tile_of(T, C, TILE // 2 if kd and not fast else LARGEST_ROW)
    blocks = triton.cdiv(T, tile_rows)
    programs = N * blocks if kd or grad is not None else 1
    kd_partial = empty(programs, dtype=float64)
    total, ctc, kd_total = outputs if kd else (outputs[0],) * 3
    other = logits if teacher is None else teacher
    written, written_teacher = (logits if x is None else x for x in (grad, grad_teacher))
    ctc_gradient_kernel[(programs,)](
        logits, *frame_strides(logits, unit), other, *frame_strides(other, unit),
        written, *frame_strides(written, unit),
        written_teacher, *frame_strides(written_teacher, unit),
        T, N, C // unit, p.size, blank, *lengths, *weight_args,
        top, rest, gamma, following, head, most, done,
        losses, ctc_factor, kd_factor, fault, kd_partial, weight_sum, total, ctc, kd_total,
        ctc_weight, kd_weight, 1 / temperature, 1 / teacher_temperature, beta,
        temperature**2 if rescale else 1.0,
        grad is not None, grad_teacher is not None, posteriors, kd, kd_weight != 0,
        REDUCTIONS[reduction], *p.flags, weights is not None, KINDS[divergence], fast,
        FLOAT, unit, tile_rows, block_c, block_s,
        p.vectors, p.lanes, num_warps=warps,
    )  # fmt: skip
    return outputs


@on_its_device
@torch.no_grad()
def ctc_loss_forward(
    logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, grad
):
    gradient = gradient_of(logits) if grad else None
    problem = Problem(logits, targets, input_lengths, target_lengths)
    (loss,) = _ctc(problem, logits, blank, reduction, zero_infinity, gradient)
    return loss, gradient


@on_its_device
@torch.no_grad()
def ctc_posteriors(logits, targets, input_lengths, target_lengths, blank):
    occupancy = torch.empty(logits.shape, dtype=float_dtype(logits), device=logits.device)
    problem = Problem(logits, targets, input_lengths, target_lengths)
    _ctc(problem, logits, blank, "none", False, occupancy, posteriors=True)
    return occupancy


@on_its_device
@torch.no_grad()
def ctc_kd_loss_forward(
    student_logits, teacher_logits, targets, input_lengths, target_lengths, labelled,
    frame_weight, blank, reduction, zero_infinity, ctc_weight, kd_weight, temperature,
    teacher_temperature, divergence, beta, rescale, student_grad, teacher_grad,
):  # fmt: skip
    grad = gradient_of(student_logits) if student_grad else None
    grad_teacher = gradient_of(teacher_logits) if teacher_grad else None
    problem = Problem(student_logits, targets, input_lengths, target_lengths, labelled)
    loss, ctc, kd = _ctc(
        problem, student_logits, blank, reduction, zero_infinity, grad, teacher=teacher_logits,
        grad_teacher=grad_teacher, frame_weight=frame_weight, ctc_weight=ctc_weight,
        kd_weight=kd_weight, temperature=temperature, teacher_temperature=teacher_temperature,
        divergence=divergence, beta=beta, rescale=rescale,
    )  # fmt: skip
    return loss, ctc, kd, grad, grad_teacher
