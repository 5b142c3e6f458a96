"""CTC, fourth kernel: the gradient, softmax - occupancy, with that of the distillation term, and
the losses of the batch. Each tile is written whole, then the entries of blank and of the
target's labels again, from the logits: nothing is rounded twice, and equal labels add up in order.
"""

import triton
import triton.language as tl

from .common import INF, jit, narrowed, row_sum, scalar, widened
from .ctc_rows import place, target_of
from .divergence import kl_row, kl_terms, load_tile, wide_gradients, wide_row


@triton.jit
def finish(N, blocks, loss_ptr, ctc_factor_ptr, target_lengths_ptr, target_lengths_stride,
           labelled_ptr, labelled_stride, fault_ptr, kd_partial_ptr, weight_sum_ptr,
           total_ptr, ctc_ptr, kd_ptr, ctc_weight, kd_weight,
           REDUCTION: tl.constexpr, LABELLED: tl.constexpr, KD: tl.constexpr):  # fmt: skip
    """The losses of the batch, from those of the utterances."""
    index = tl.arange(0, 128)[:, None]
    many = tl.arange(0, 32)[None, :]
    ctc_sum = tl.zeros([128, 1], tl.float64)
    kd_sum = tl.zeros([128, 1], tl.float64)
    count = tl.zeros([128, 1], tl.float64)
    weights = tl.zeros([128, 1], tl.float64)
    for first in range(0, N, 128):
        n = first + index
        here = n < N
        transcript = here
        if LABELLED:
            flag = tl.load(labelled_ptr + n * labelled_stride, mask=here, other=0)
            transcript = here & (flag != 0)
        count += transcript.to(tl.float64)
        ctc = tl.load(loss_ptr + n, mask=here, other=0)
        kd = tl.zeros([128, 1], tl.float64)
        if KD:
            for b in range(0, blocks, 32):
                kd += row_sum(
                    tl.load(
                        kd_partial_ptr + n.to(tl.int64) * blocks + b + many,
                        mask=here & (b + many < blocks),
                        other=0,
                        cache_modifier=".cg",
                    )
                )
            fault = tl.load(fault_ptr + n, mask=here, other=0)
            kd = tl.where(fault == 1, float("nan"), kd)
            weights += tl.load(weight_sum_ptr + n, mask=here, other=0)
        if REDUCTION == 0:
            total = tl.where(ctc_weight != 0, ctc * ctc_weight, 0.0)
            if KD:
                total += tl.where(kd_weight != 0, kd * kd_weight, 0.0)
                tl.store(kd_ptr + n, kd, mask=here)
                tl.store(ctc_ptr + n, ctc, mask=here)
            tl.store(total_ptr + n, total, mask=here)
        if REDUCTION == 1:
            given = tl.load(target_lengths_ptr + n * target_lengths_stride, mask=here, other=1).to(
                tl.float64
            )
            ctc = ctc / tl.maximum(given, 1.0)
        ctc_sum += tl.where(transcript, ctc, 0.0)
        kd_sum += kd
    if REDUCTION != 0:
        ctc_all, kd_all = tl.sum(ctc_sum), tl.sum(kd_sum)
        if REDUCTION == 1:
            labelled, weight = tl.sum(count), tl.sum(weights)
            ctc_all = tl.where(labelled == 0, 0.0, ctc_all / labelled)
            kd_all = tl.where(weight == 0, kd_all * 0, kd_all / weight)
        total_all = tl.where(ctc_weight != 0, ctc_all * ctc_weight, 0.0)
        if KD:
            total_all += tl.where(kd_weight != 0, kd_all * kd_weight, 0.0)
            tl.store(ctc_ptr, ctc_all)
            tl.store(kd_ptr, kd_all)
        tl.store(total_ptr, total_all)


@jit
def ctc_gradient_kernel(
    student_ptr, stride_t, stride_n, teacher_ptr, teacher_t, teacher_n,
    grad_ptr, grad_t, grad_n, grad_teacher_ptr, grad_teacher_t, grad_teacher_n,
    T, N, c_units, SIZE, blank, targets_ptr, targets_n, targets_s,
    target_lengths_ptr, target_lengths_stride, input_lengths_ptr, input_lengths_stride,
    labelled_ptr, labelled_stride, weight_ptr, weight_t, weight_n,
    top_ptr, rest_ptr, gamma_ptr, next_ptr, head_ptr, most_ptr, done_ptr,
    loss_ptr, ctc_factor_ptr, kd_factor_ptr, fault_ptr, kd_partial_ptr, weight_sum_ptr,
    total_ptr, ctc_ptr, kd_ptr, ctc_weight: tl.float64, kd_weight: tl.float64,
    s_scale: tl.float64, t_scale: tl.float64, beta: tl.float64, factor: tl.float64,
    GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, POSTERIORS: tl.constexpr, KD: tl.constexpr,
    KD_GRAD: tl.constexpr, REDUCTION: tl.constexpr, PADDED: tl.constexpr, LABELLED: tl.constexpr,
    WEIGHTED: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, FLOAT: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    VECTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    C = c_units * UNIT
    SP: tl.constexpr = VECTORS * LANES
    blocks = tl.cdiv(T, ROWS)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    n64 = n.to(tl.int64)
    frames = tl.load(input_lengths_ptr + n * input_lengths_stride).to(tl.int64)
    frames = tl.minimum(tl.maximum(frames, 0), T)
    t = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    exists, valid = t < T, t < frames
    columns = tl.arange(0, BLOCK_C)[None, :]
    rows = student_ptr + (t * stride_t + n64 * stride_n) * UNIT
    grad_rows = grad_ptr + (t * grad_t + n64 * grad_n) * UNIT
    used = valid
    weight = tl.full([ROWS, 1], 1, tl.float64)
    if KD:
        teacher_rows = teacher_ptr + (t * teacher_t + n64 * teacher_n) * UNIT
        grad_teacher_rows = grad_teacher_ptr + (t * grad_teacher_t + n64 * grad_teacher_n) * UNIT
        if WEIGHTED:
            weight = tl.load(weight_ptr + t * weight_t + n64 * weight_n, mask=valid, other=0).to(
                tl.float64
            )
            used = valid & (weight != 0)
        kd_factor = tl.load(kd_factor_ptr + n) * weight * factor
        if FAST:
            kd_scale = scalar(s_scale, tl.float32)
            row = kl_row(teacher_rows, rows, used, C, kd_scale, ROWS, BLOCK_C)
        if TEACHER_GRAD or not FAST:
            wts, wss = scalar(t_scale, tl.float64), scalar(s_scale, tl.float64)
            wide_beta = scalar(beta, tl.float64)
            wide = wide_row(teacher_rows, rows, used, C, wts, wss, wide_beta, KIND, ROWS, BLOCK_C)
        kd = tl.zeros([ROWS, 1], tl.float64)
    if GRAD:
        ctc_factor = tl.load(ctc_factor_ptr + n)
        top = tl.load(top_ptr + n64 * T + t, mask=valid & (ctc_factor != 0), other=0)
        rest = tl.load(rest_ptr + n64 * T + t, mask=valid & (ctc_factor != 0), other=0)
        scale = (ctc_factor / (1 + rest.to(tl.float64))).to(FLOAT)
        on = valid & (ctc_factor != 0)
    for c in range(0, C, BLOCK_C):
        inside = exists & (c + columns < C)
        if GRAD:
            grad = tl.zeros([ROWS, BLOCK_C], FLOAT)
            if POSTERIORS:
                grad = tl.where(valid & (ctc_factor != ctc_factor), float("nan"), grad)
            else:
                x = load_tile(rows, c + columns, on, C, FLOAT)
                grad = tl.where(on, tl.exp(x - top) * scale, 0.0)
        if KD:
            if FAST:
                teacher = load_tile(teacher_rows, c + columns, used, C, tl.float32)
                student = load_tile(rows, c + columns, used, C, tl.float32)
                term, part = kl_terms(row, teacher, student, kd_scale)
                kd += row_sum(term).to(tl.float64)
                if GRAD and KD_GRAD:
                    grad += tl.where(used, part * (kd_factor * s_scale).to(tl.float32), 0.0)
            if TEACHER_GRAD or (GRAD and KD_GRAD and not FAST):
                teacher = load_tile(teacher_rows, c + columns, used, C, tl.float64)
                student = load_tile(rows, c + columns, used, C, tl.float64)
                part_s, part_t = wide_gradients(wide, teacher, student, wts, wss, wide_beta, KIND)
                if GRAD and KD_GRAD and not FAST:
                    grad += tl.where(used, part_s * (kd_factor * s_scale), 0.0).to(FLOAT)
                if TEACHER_GRAD:
                    part_t = tl.where(used & (kd_factor != 0), part_t * (kd_factor * t_scale), 0.0)
                    tl.store(
                        grad_teacher_rows + c + columns,
                        narrowed(part_t, grad_teacher_ptr),
                        mask=inside,
                    )
        if GRAD:
            tl.store(grad_rows + c + columns, narrowed(grad, grad_ptr), mask=inside)

    if GRAD:
        if (ctc_factor == ctc_factor) & (ctc_factor != 0) & (block * ROWS < frames):
            tl.debug_barrier()  # what follows writes some of these entries again
            offset, S, bounded = target_of(
                n, target_lengths_ptr, target_lengths_stride, targets_n, targets_s, SIZE, PADDED
            )
            S = tl.minimum(S, SP - 1).to(tl.int32)
            most = 0
            if S > 0:
                most = tl.load(most_ptr + n)
            gamma_row = gamma_ptr + (n64 * T + t) * SP
            labels_sum = tl.zeros([ROWS, 1], FLOAT)
            for k0 in range(0, S + 1, BLOCK_S):
                k = k0 + tl.arange(0, BLOCK_S)[None, :]
                is_label = k < S
                label = tl.load(targets_ptr + offset + k * targets_s, mask=is_label, other=0).to(
                    tl.int64
                )
                occupancy = tl.load(
                    gamma_row + place(k, VECTORS, LANES), mask=valid & is_label, other=0
                )
                labels_sum += row_sum(occupancy)
                head = tl.load(head_ptr + n64 * SP + k, mask=is_label, other=0) != 0
                link = tl.load(next_ptr + n64 * SP + k, mask=head, other=-1)
                for link_number in range(0, most):
                    more = link >= 0
                    occupancy += tl.load(
                        gamma_row + place(tl.maximum(link, 0), VECTORS, LANES),
                        mask=valid & more,
                        other=0,
                    )
                    link = tl.load(next_ptr + n64 * SP + tl.maximum(link, 0), mask=more, other=-1)
                # After the last label comes blank, which has what the labels leave.
                is_blank = k == S
                label = tl.where(is_blank, blank, label)
                left = tl.maximum(1 - labels_sum, 0.0)
                occupancy = tl.where(is_blank, left, occupancy)
                mask = valid & (is_blank | head)
                x = widened(tl.load(rows + label, mask=mask, other=0), FLOAT)
                if POSTERIORS:
                    grad = occupancy
                else:
                    grad = tl.exp(x - top) * scale - occupancy * ctc_factor.to(FLOAT)
                    if KD:
                        if KD_GRAD:
                            both = used & mask
                            if FAST:
                                student = widened(
                                    tl.load(rows + label, mask=both, other=0), tl.float32
                                )
                                teacher = widened(
                                    tl.load(teacher_rows + label, mask=both, other=0), tl.float32
                                )
                                part = kl_terms(row, teacher, student, kd_scale)[1]
                                part = part * (kd_factor * s_scale).to(tl.float32)
                            else:
                                student = widened(
                                    tl.load(rows + label, mask=both, other=0), tl.float64
                                )
                                teacher = widened(
                                    tl.load(teacher_rows + label, mask=both, other=0), tl.float64
                                )
                                part = wide_gradients(
                                    wide, teacher, student, wts, wss, wide_beta, KIND
                                )[0]
                                part = part * (kd_factor * s_scale)
                            grad += tl.where(used, part, 0.0).to(FLOAT)
                grad = tl.where(x == -INF, 0.0, grad)
                tl.store(grad_rows + label, narrowed(grad, grad_ptr), mask=mask)

    if KD:
        if not FAST:
            kd = wide[4]
        kd = tl.where(used, kd * weight * factor, 0.0)
        tl.store(kd_partial_ptr + tl.program_id(0), tl.sum(kd))
        tl.debug_barrier()  # the partial sum is stored before this program counts as done
        last = tl.atomic_add(done_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    else:
        last = tl.program_id(0) == 0
    if last:
        if not POSTERIORS:
            finish(
                N, blocks, loss_ptr, ctc_factor_ptr, target_lengths_ptr, target_lengths_stride,
                labelled_ptr, labelled_stride, fault_ptr, kd_partial_ptr, weight_sum_ptr,
                total_ptr, ctc_ptr, kd_ptr, ctc_weight, kd_weight, REDUCTION, LABELLED, KD,
            )  # fmt: skip
