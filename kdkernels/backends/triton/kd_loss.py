"""kd_loss: the divergence of each row and its gradients, several rows a program where they are
short. A row that fits on chip is read once; a longer one twice. Losses of programs are added by the
program that ends last, in their own order, so that a step takes three kernels.
"""

import torch
import triton
import triton.language as tl

from kdkernels.backends._codes import float_dtype, gradient_of, merged_dims

from .common import (
    LARGEST_ROW,
    TILE,
    as_bytes,
    jit,
    narrowed,
    on_its_device,
    row_sum,
    scalar,
    tile_of,
    tl_dtype,
    unit_of,
    widened,
)
from .divergence import (
    KINDS,
    is_fast,
    kl_end,
    kl_row,
    kl_terms,
    kl_terms_of,
    kl_tile,
    load_tile,
    wide_gradients,
    wide_row,
)

PARTS = 256  # programs that add up weights
NONE, MEAN, SUM, BATCHMEAN = (tl.constexpr(i) for i in range(4))
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "batchmean": 3}


@jit
def kd_loss_begin_kernel(weight_ptr, outer_stride, inner_stride, inner, rows, parts_ptr, done_ptr,
                         WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums of parts of the weights; nobody is done yet."""
    part = tl.program_id(0)
    if part == 0:
        tl.store(done_ptr, 0)
    if WEIGHTED:
        total = tl.zeros([BLOCK], tl.float64)
        size = tl.cdiv(rows, tl.num_programs(0))
        begin = part.to(tl.int64) * size
        end = tl.minimum(begin + size, rows)
        for first in range(begin, end, BLOCK):
            r = first + tl.arange(0, BLOCK)
            weight = tl.load(
                weight_ptr + (r // inner) * outer_stride + (r % inner) * inner_stride,
                mask=r < end,
                other=0,
            )
            total += weight.to(tl.float64)
        tl.store(parts_ptr + part, tl.sum(total))


@triton.jit
def row_pointers(ptr, r, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    return ptr + ((r // inner) * outer_stride + (r % inner) * inner_stride) * UNIT


@jit
def kd_loss_kernel(
    student_ptr, student_outer, student_inner, teacher_ptr, teacher_outer, teacher_inner,
    grad_student_ptr, grad_student_outer, grad_student_inner,
    grad_teacher_ptr, grad_teacher_outer, grad_teacher_inner,
    weight_ptr, weight_outer, weight_inner, loss_ptr, partial_ptr, parts_ptr, done_ptr,
    rows, inner, c_units, batch, parts, s_scale: tl.float64, t_scale: tl.float64, beta: tl.float64,
    factor: tl.float64,
    STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, WEIGHTED: tl.constexpr,
    REDUCTION: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    C = c_units * UNIT
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    used = r < rows
    weight = tl.full([ROWS, 1], 1, tl.float64)
    if WEIGHTED:
        offsets = (r // inner) * weight_outer + (r % inner) * weight_inner
        weight = tl.load(weight_ptr + offsets, mask=used, other=0).to(tl.float64)
        used = used & (weight != 0)
    row_factor = weight * factor
    grad_factor = row_factor
    if REDUCTION == MEAN:
        total = rows.to(tl.float64)
        if WEIGHTED:
            part = tl.arange(0, PARTS)
            total = tl.sum(tl.load(parts_ptr + part, mask=part < parts, other=0))
        mean = tl.where(total == 0, 0.0, 1 / total)
        grad_factor *= mean
    elif REDUCTION == BATCHMEAN:
        grad_factor /= batch.to(tl.float64)

    student_rows = row_pointers(student_ptr, r, inner, student_outer, student_inner, UNIT)
    teacher_rows = row_pointers(teacher_ptr, r, inner, teacher_outer, teacher_inner, UNIT)
    grad_student_rows = row_pointers(
        grad_student_ptr, r, inner, grad_student_outer, grad_student_inner, UNIT
    )
    grad_teacher_rows = row_pointers(
        grad_teacher_ptr, r, inner, grad_teacher_outer, grad_teacher_inner, UNIT
    )
    if FAST:
        scale = scalar(s_scale, tl.float32)
        student_factor = tl.where(used, grad_factor * s_scale, 0.0).to(tl.float32)
        # Names of their own: the compiler wants one dtype of a name, and below it is float64.
        if ON_CHIP:
            t_logits = load_tile(teacher_rows, columns, used, C, tl.float32)
            s_logits = load_tile(student_rows, columns, used, C, tl.float32)
            state, t_exp, s_exp = kl_tile(t_logits, s_logits, scale)
            row = kl_end(state)
            term, grad = kl_terms_of(row, t_exp, s_exp, t_logits, s_logits, scale)
            loss = row_sum(term).to(tl.float64)
            if STUDENT_GRAD:
                tl.store(
                    grad_student_rows + columns,
                    tl.where(used, grad * student_factor, 0.0),
                    mask=(r < rows) & (columns < C),
                )
        else:
            row = kl_row(teacher_rows, student_rows, used, C, scale, ROWS, BLOCK_C)
            loss = tl.zeros([ROWS, 1], tl.float64)
            for c in range(0, C, BLOCK_C):
                t_logits = load_tile(teacher_rows, c + columns, used, C, tl.float32)
                s_logits = load_tile(student_rows, c + columns, used, C, tl.float32)
                term, grad = kl_terms(row, t_logits, s_logits, scale)
                loss += row_sum(term).to(tl.float64)
                if STUDENT_GRAD:
                    tl.store(
                        grad_student_rows + c + columns,
                        tl.where(used, grad * student_factor, 0.0),
                        mask=(r < rows) & (c + columns < C),
                    )
    if TEACHER_GRAD or not FAST:
        ts, ss = scalar(t_scale, tl.float64), scalar(s_scale, tl.float64)
        beta_tile = scalar(beta, tl.float64)
        row = wide_row(teacher_rows, student_rows, used, C, ts, ss, beta_tile, KIND, ROWS, BLOCK_C)
        if not FAST:
            loss = row[4]
        if TEACHER_GRAD or STUDENT_GRAD:
            for c in range(0, C, BLOCK_C):
                teacher = load_tile(teacher_rows, c + columns, used, C, tl.float64)
                student = load_tile(student_rows, c + columns, used, C, tl.float64)
                grad_s, grad_t = wide_gradients(row, teacher, student, ts, ss, beta_tile, KIND)
                inside = (r < rows) & (c + columns < C)
                if STUDENT_GRAD and not FAST:
                    grad_s = tl.where(used, grad_s * (grad_factor * s_scale), 0.0)
                    tl.store(
                        grad_student_rows + c + columns,
                        narrowed(grad_s, grad_student_ptr),
                        mask=inside,
                    )
                if TEACHER_GRAD:
                    grad_t = tl.where(used, grad_t * (grad_factor * t_scale), 0.0)
                    tl.store(
                        grad_teacher_rows + c + columns,
                        narrowed(grad_t, grad_teacher_ptr),
                        mask=inside,
                    )

    loss = tl.where(used, loss * row_factor, 0.0)
    if REDUCTION == NONE:
        tl.store(loss_ptr + r, loss, mask=r < rows)
    else:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(loss))
        tl.debug_barrier()  # the partial sum is stored before this program counts as done
        programs = tl.num_programs(0)
        if tl.atomic_add(done_ptr, 1, sem="acq_rel") == programs - 1:
            index = tl.arange(0, 1024)
            sums = tl.zeros([1024], tl.float64)
            for first in range(0, programs, 1024):
                sums += tl.load(
                    partial_ptr + first + index,
                    mask=first + index < programs,
                    other=0,
                    cache_modifier=".cg",
                )
            result = tl.sum(sums)
            if REDUCTION == MEAN:
                result *= mean
            elif REDUCTION == BATCHMEAN:
                result /= batch.to(tl.float64)
            tl.store(loss_ptr, result)


@jit
def scale_grad_kernel(grad_ptr, grad_outer, grad_inner, loss_ptr, loss_outer, loss_inner,
                      rows, inner, c_units, FLOAT: tl.constexpr, UNIT: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    C = c_units * UNIT
    columns = tl.arange(0, BLOCK_C)[None, :]
    step = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, rows, step):
        r = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        offsets = (r // inner) * loss_outer + (r % inner) * loss_inner
        factor = tl.load(loss_ptr + offsets, mask=r < rows, other=1).to(FLOAT)
        if tl.max((factor != 1).to(tl.int32)) > 0:
            grad_rows = row_pointers(grad_ptr, r, inner, grad_outer, grad_inner, UNIT)
            for c in range(0, C, BLOCK_C):
                inside = (r < rows) & (c + columns < C)
                grad = tl.load(grad_rows + c + columns, mask=inside)
                grad = narrowed(widened(grad, FLOAT) * factor, grad_ptr)
                tl.store(grad_rows + c + columns, grad, mask=inside)


def row_layout(shape, tensors):
    """(rows of the inner dim, [(outer stride, inner stride)]), the leading dims merged into two;
    None where they do not merge."""
    sizes, strides = merged_dims(shape, tensors)
    if len(sizes) > 2:
        return None
    missing = 2 - len(sizes)
    inner = ([1] * missing + sizes)[1]
    return inner, [tuple([0] * missing + s) for s in strides]


@on_its_device
def scale_grad_(grad, grad_loss):
    """`grad` [*, C] times `grad_loss`, in place: a scalar, or one for each row or utterance."""
    C = grad.shape[-1]
    rows = grad.numel() // C
    shape = grad.shape[:-1]
    factors = grad_loss.expand(shape)
    layout = row_layout(shape, [grad, factors])
    if not rows or layout is None:
        return grad.mul_(grad_loss.unsqueeze(-1))
    inner, (grad_strides, factor_strides) = layout
    unit = unit_of(C, grad)
    tile_rows, block, warps = tile_of(rows, C)
    scale_grad_kernel[(min(triton.cdiv(rows, tile_rows), 1024),)](
        grad, *(n // unit for n in grad_strides), factors, *factor_strides, rows, inner, C // unit,
        tl_dtype(float_dtype(grad, grad_loss)), unit, tile_rows, block, num_warps=warps,
    )  # fmt: skip
    return grad


@on_its_device
@torch.no_grad()
def kd_loss_forward(
    student_logits,
    teacher_logits,
    weight,
    temperature,
    teacher_temperature,
    divergence,
    beta,
    reduction,
    rescale,
    student_grad,
    teacher_grad,
):
    *shape, C = student_logits.shape
    rows = student_logits.numel() // C
    device = student_logits.device
    dtype = float_dtype(student_logits, teacher_logits)
    loss_shape = tuple(shape) if reduction == "none" else ()
    grad_student = gradient_of(student_logits) if student_grad else None
    grad_teacher = gradient_of(teacher_logits) if teacher_grad else None
    if not rows:
        return torch.zeros(loss_shape, dtype=dtype, device=device), grad_student, grad_teacher

    weights = None if weight is None else as_bytes(weight).expand(shape)
    copies = [student_logits, teacher_logits, grad_student, grad_teacher]
    given = [*copies, weights]
    layout = row_layout(shape, [x for x in given if x is not None])
    if layout is None:  # more than two leading dims that do not merge: contiguous copies
        copies = [x if x is None else x.contiguous() for x in copies]
        weights = weights if weights is None else weights.contiguous()
        given = [*copies, weights]
        layout = row_layout(shape, [x for x in given if x is not None])
    inner, found = layout
    found = iter(found)
    strides = [(0, 0) if x is None else next(found) for x in given]
    unit = unit_of(C, *copies)
    fast = is_fast(dtype, divergence, temperature, teacher_temperature)
    tile_rows, block, warps = tile_of(rows, C, LARGEST_ROW if fast else TILE // 2)
    programs = triton.cdiv(rows, tile_rows)

    loss = torch.empty(loss_shape, dtype=dtype, device=device)
    partial = parts = done = None
    n_parts = 1
    if reduction != "none":
        partial, parts, done = (
            torch.empty(n, dtype=kind, device=device)
            for n, kind in ((programs, torch.float64), (PARTS, torch.float64), (1, torch.int32))
        )
        weighted_mean = weights is not None and reduction == "mean"
        if weighted_mean:
            n_parts = min(PARTS, triton.cdiv(rows, 1024))
        kd_loss_begin_kernel[(n_parts,)](
            weights, *strides[4], inner, rows, parts, done,
            weighted_mean, 1024, num_warps=4,
        )  # fmt: skip
    tensors = [
        argument
        for x, pair in zip(copies, strides, strict=False)
        for argument in (student_logits if x is None else x, *(n // unit for n in pair))
    ]
    kd_loss_kernel[(programs,)](
        *tensors, weights, *strides[4], loss, partial, parts, done,
        rows, inner, C // unit, shape[0] if shape else 1, n_parts,
        1 / temperature, 1 / teacher_temperature, beta, temperature**2 if rescale else 1.0,
        student_grad, teacher_grad, weights is not None, REDUCTIONS[reduction], KINDS[divergence],
        fast, PARTS, unit, tile_rows, block, block >= C, num_warps=warps,
    )  # fmt: skip
    for i, grad in ((2, grad_student), (3, grad_teacher)):
        if grad is not copies[i]:
            grad.copy_(copies[i])
    return loss, grad_student, grad_teacher
