"""Divergences of rows of two tensors and their gradients, tile by tile: what a row must know before
its gradient can be written, then the gradient of a tile. Nothing of the size of a row is stored.

The forward KL at one temperature and its gradient to the student are float32 (`kl_...`); what is a
difference of logarithms (the teacher's gradient, the other divergences), or of the logarithms of
unlike numbers (two temperatures), is float64 (`wide_...`).
"""

import torch
import triton
import triton.language as tl

from .common import (
    INF,
    LN2,
    difference,
    exp_scaled,
    row_sum,
    softmax_begin,
    softmax_end,
    softmax_join,
    softmax_merge,
    softmax_tile,
    widened,
)

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def is_fast(dtype, divergence, temperature, teacher_temperature):
    """Whether the loss and the student's gradient are made in float32."""
    one = temperature == teacher_temperature
    return dtype == torch.float32 and divergence == "forward_kl" and one


@triton.jit
def load_tile(rows, columns, used, C, FLOAT: tl.constexpr):
    return widened(tl.load(rows + columns, mask=used & (columns < C), other=-INF), FLOAT)


# ------------------------------------------------------------------------------ forward KL, float32
#
# d = log p - log q, p of the teacher: the scaled difference of the logits, less that of the largest
# ones (`relative_difference`), plus `shift`, the logarithm of the ratio of the normalisers. These
# are sums that may have nearly all in common; their difference is summed class by class, with
# expm1 where it is small. So d, the loss and the gradient keep their relative accuracy down to
# identical rows, where they are exactly 0, and in rows whose largest p is near 1, where the class
# of both maxima adds nothing.


@triton.jit
def expm1_plus(d):
    """expm1(-d) + d for |d| <= 1: never negative, relative error 1e-7."""
    x = -d
    y = x * (1.0 / 3628800) + 1.0 / 362880
    y = y * x + 1.0 / 40320
    y = y * x + 1.0 / 5040
    y = y * x + 1.0 / 720
    y = y * x + 1.0 / 120
    y = y * x + 1.0 / 24
    y = y * x + 1.0 / 6
    y = y * x + 0.5
    return d * d * y


@triton.jit
def log1p_float32(z):
    """log(1 + z), z > -0.3, relative error 1e-7."""
    bits = (z + 1.0).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = tl.where(exponent == 0, z, ((bits - (exponent << 23)).to(tl.float32, bitcast=True)) - 1.0)
    r = tl.div_rn(f, f + 2.0)  # rounded well: of a tiny z the logarithm is z
    square = r * r
    y = square * (2.0 / 11) + 2.0 / 9
    y = y * square + 2.0 / 7
    y = y * square + 2.0 / 5
    y = y * square + 2.0 / 3
    y = y * square + 2.0
    log = exponent.to(tl.float32) * LN2 + y * r
    return tl.where(z < INF, log, z)  # nan stays


@triton.jit
def relative_difference(reference, lost, teacher, student, scale):
    """The scaled difference of the logits less the reference: 0 for a class that is masked in both.
    The logits may differ by a constant much larger than what is left: what the differences lose is
    carried along."""
    d, here_lost = difference(teacher, student)
    d = tl.where(tl.abs(d) < INF, (d - reference) + (here_lost - lost), d) * scale
    return tl.where((teacher == -INF) & (student == -INF), 0.0, d)


@triton.jit
def excess(t_exp, s_exp, d):
    """s_exp - t_exp, of which d is the logarithm of t_exp / s_exp."""
    return tl.where(tl.abs(d) < 1, t_exp * (expm1_plus(d) - d), s_exp - t_exp)


@triton.jit
def kl_begin(ROWS: tl.constexpr):
    """Of the teacher and of the student: the largest logit, the sum of the exponentials without one
    of the largest; then by how much the student's whole sum exceeds the teacher's."""
    t_max, t_rest = softmax_begin(ROWS, tl.float32)
    s_max, s_rest = softmax_begin(ROWS, tl.float32)
    return t_max, t_rest, s_max, s_rest, tl.zeros([ROWS, 1], tl.float32)


@triton.jit
def kl_tile(teacher, student, scale):
    """The same of one tile, and its exponentials."""
    t_max, t_rest, t_exp = softmax_tile(teacher, scale, tl.float32)
    s_max, s_rest, s_exp = softmax_tile(student, scale, tl.float32)
    t_exp, s_exp = tl.where(teacher == -INF, 0.0, t_exp), tl.where(student == -INF, 0.0, s_exp)
    reference, lost = difference(t_max, s_max)
    d = relative_difference(reference, lost, teacher, student, scale)
    return (t_max, t_rest, s_max, s_rest, row_sum(excess(t_exp, s_exp, d))), t_exp, s_exp


@triton.jit
def kl_excess_at(state, t_max, s_max, scale):
    """The excess of a state as it is when the largest logits are these, which are no smaller."""
    t_top, t_rest, s_top, s_rest, more = state
    t_factor = tl.where(t_top == -INF, 0.0, exp_scaled(t_top - t_max, scale, tl.float32))
    s_factor = tl.where(s_top == -INF, 0.0, exp_scaled(s_top - s_max, scale, tl.float32))
    reference, lost = difference(t_max, s_max)
    d = relative_difference(reference, lost, t_top, s_top, scale)
    # Both sums shrink by the smaller factor; one of them by less. A sum that shrinks to nothing may
    # have been so large that the other one is lost in the excess.
    one = tl.where(s_factor >= t_factor, s_rest, t_rest) + 1
    return more * tl.minimum(t_factor, s_factor) + excess(t_factor, s_factor, d) * one


@triton.jit
def kl_join(state, teacher, student, scale):
    """Takes a tile along."""
    here, _, _ = kl_tile(teacher, student, scale)
    t_max, t_rest = softmax_merge(state[0], state[1], here[0], here[1], scale, tl.float32)
    s_max, s_rest = softmax_merge(state[2], state[3], here[2], here[3], scale, tl.float32)
    more = kl_excess_at(state, t_max, s_max, scale) + kl_excess_at(here, t_max, s_max, scale)
    return t_max, t_rest, s_max, s_rest, more


@triton.jit
def kl_end(state):
    """What the gradient needs to know of a row."""
    t_max, t_rest, s_max, s_rest, more = state
    t_rest = softmax_end(t_max, t_rest)
    s_rest = softmax_end(s_max, s_rest)
    t_inverse, s_inverse = 1 / (1 + t_rest), 1 / (1 + s_rest)
    more += (t_rest + s_rest) * 0  # nan where either is
    shift = log1p_float32(tl.abs(more) * tl.where(more > 0, t_inverse, s_inverse))
    reference, lost = difference(t_max, s_max)
    return t_max, t_inverse, s_max, s_inverse, reference, lost, tl.where(more > 0, shift, -shift)


@triton.jit
def kl_terms(row, teacher, student, scale):
    """Terms of the loss, and q - p, of a tile."""
    t_exp = exp_scaled(teacher - row[0], scale, tl.float32)
    s_exp = exp_scaled(student - row[2], scale, tl.float32)
    return kl_terms_of(row, t_exp, s_exp, teacher, student, scale)


@triton.jit
def kl_terms_of(row, t_exp, s_exp, teacher, student, scale):
    t_max, t_inverse, s_max, s_inverse, reference, lost, shift = row
    p, q = t_exp * t_inverse, s_exp * s_inverse
    d = relative_difference(reference, lost, teacher, student, scale) + shift
    plus = expm1_plus(d)
    close = tl.abs(d) < 1  # beyond, q - p + p d loses a few bits at most
    change = tl.where(close, p * (plus - d), q - p)
    term = tl.where(close, p * plus, change + tl.where(p > 0, p * d, 0.0))
    term = tl.where((teacher == -INF) & (student == -INF), p * 0, term)
    # Where no class is left (a shift of nan) there is no gradient of 0 either.
    return term, tl.where((student == -INF) & (shift == shift), 0.0, change)


@triton.jit
def kl_row(
    teacher_rows,
    student_rows,
    used,
    C,
    scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """kl_end of rows that do not fit on chip, in one visit."""
    columns = tl.arange(0, BLOCK_C)[None, :]
    state = kl_begin(ROWS)
    for c in range(0, C, BLOCK_C):
        teacher = load_tile(teacher_rows, c + columns, used, C, tl.float32)
        student = load_tile(student_rows, c + columns, used, C, tl.float32)
        state = kl_join(state, teacher, student, scale)
    return kl_end(state)


# ----------------------------------------------------------------------- every divergence, float64


@triton.jit
def wide_expm1_plus(d):
    """expm1(-d) + d, expm1(-d)"""
    x = -d
    y = x * (1.0 / 3628800) + 1.0 / 362880
    y = y * x + 1.0 / 40320
    y = y * x + 1.0 / 5040
    y = y * x + 1.0 / 720
    y = y * x + 1.0 / 120
    y = y * x + 1.0 / 24
    y = y * x + 1.0 / 6
    y = y * x + 0.5
    series = d * d * y
    small = tl.abs(d) < 0.1
    direct = tl.exp(x) - 1
    return tl.where(small, series, direct + d), tl.where(small, series - d, direct)


@triton.jit
def wide_log1p(z):
    u = 1 + z
    return tl.log(u) - ((u - 1) - z) / u


@triton.jit
def wide_logs(row, teacher, student, t_scale, s_scale):
    """log-probabilities (of the student, of the teacher)"""
    return (
        (student - row[2]) * s_scale - row[3],
        (teacher - row[0]) * t_scale - row[1],
    )


@triton.jit
def kl_value(p, q, d):
    """Terms of KL(p || q), d = log p - log q: each is >= 0."""
    plus, _ = wide_expm1_plus(tl.minimum(tl.maximum(d, -1.0), 1.0))
    far = tl.where(p == 0, q, q - p + p * d)
    return tl.where(tl.abs(d) < 1, p * plus, far)


@triton.jit
def log_ratio(log_p, log_q):
    return tl.where(log_p == log_q, 0.0, log_p - log_q)


@triton.jit
def jsd_logs(log_s, log_t, beta):
    """(log m, log s - log m, log t - log m), m = beta t + (1 - beta) s"""
    a, b = log_t + tl.log(beta), log_s + tl.log(1 - beta)
    top = tl.maximum(a, b)
    log_m = tl.where(top == -INF, -INF, top + tl.log(tl.exp(a - top) + tl.exp(b - top)))
    d = log_ratio(log_t, log_s)
    near = tl.abs(d) < 1
    d = tl.minimum(tl.maximum(d, -1.0), 1.0)
    _, down = wide_expm1_plus(d)
    _, up = wide_expm1_plus(-d)
    u_s = tl.where(near, -wide_log1p(beta * up), log_s - log_m)
    u_t = tl.where(near, -wide_log1p((1 - beta) * down), log_t - log_m)
    u_s = tl.where(log_m == -INF, 0.0, tl.where(log_s == -INF, -INF, u_s))
    u_t = tl.where(log_m == -INF, 0.0, tl.where(log_t == -INF, -INF, u_t))
    return log_m, u_s, u_t


@triton.jit
def wide_row(
    teacher_rows,
    student_rows,
    used,
    C,
    t_scale,
    s_scale,
    beta,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The loss of each row, and what the gradient needs to know."""
    columns = tl.arange(0, BLOCK_C)[None, :]
    t_max, t_rest = softmax_begin(ROWS, tl.float64)
    s_max, s_rest = softmax_begin(ROWS, tl.float64)
    for c in range(0, C, BLOCK_C):
        teacher = load_tile(teacher_rows, c + columns, used, C, tl.float64)
        student = load_tile(student_rows, c + columns, used, C, tl.float64)
        t_max, t_rest = softmax_join(t_max, t_rest, teacher, t_scale, tl.float64)
        s_max, s_rest = softmax_join(s_max, s_rest, student, s_scale, tl.float64)
    t_log = wide_log1p(softmax_end(t_max, t_rest))
    s_log = wide_log1p(softmax_end(s_max, s_rest))
    loss = tl.zeros([ROWS, 1], tl.float64)
    s_mean = tl.zeros([ROWS, 1], tl.float64)
    t_mean = tl.zeros([ROWS, 1], tl.float64)
    for c in range(0, C, BLOCK_C):
        teacher = load_tile(teacher_rows, c + columns, used, C, tl.float64)
        student = load_tile(student_rows, c + columns, used, C, tl.float64)
        log_s, log_t = wide_logs((t_max, t_log, s_max, s_log), teacher, student, t_scale, s_scale)
        s, t = tl.exp(log_s), tl.exp(log_t)
        if KIND == JSD:
            log_m, u_s, u_t = jsd_logs(log_s, log_t, beta)
            m = tl.exp(log_m)
            terms = (1 - beta) * kl_value(s, m, u_s) + beta * kl_value(t, m, u_t)
            s_mean += row_sum(tl.where(s == 0, 0.0, s * u_s))
            t_mean += row_sum(tl.where(t == 0, 0.0, t * u_t))
        elif KIND == REVERSE_KL:
            terms = kl_value(s, t, log_ratio(log_s, log_t))
        else:
            terms = kl_value(t, s, log_ratio(log_t, log_s))
        loss += row_sum(terms)
    loss = tl.where((t_log == t_log) & (s_log == s_log), loss, float("nan"))
    return t_max, t_log, s_max, s_log, loss, s_mean, t_mean


@triton.jit
def wide_gradients(row, teacher, student, t_scale, s_scale, beta, KIND: tl.constexpr):
    """Gradients with respect to the scaled logits of the student and of the teacher, of a tile."""
    loss, s_mean, t_mean = row[4], row[5], row[6]
    log_s, log_t = wide_logs(row, teacher, student, t_scale, s_scale)
    s, t = tl.exp(log_s), tl.exp(log_t)
    if KIND == JSD:
        _, u_s, u_t = jsd_logs(log_s, log_t, beta)
        grad_s = (1 - beta) * s * (tl.where(s == 0, 0.0, u_s) - s_mean)
        grad_t = beta * t * (tl.where(t == 0, 0.0, u_t) - t_mean)
    elif KIND == REVERSE_KL:
        grad_s, grad_t = kl_gradients(s, t, log_ratio(log_s, log_t), loss)
    else:
        grad_t, grad_s = kl_gradients(t, s, log_ratio(log_t, log_s), loss)
    nan = loss != loss
    grad_s = tl.where(student == -INF, 0.0, grad_s)
    grad_t = tl.where(teacher == -INF, 0.0, grad_t)
    return tl.where(nan, float("nan"), grad_s), tl.where(nan, float("nan"), grad_t)


@triton.jit
def kl_gradients(p, q, d, loss):
    """Gradients of KL(p || q) to p and to q. Where it is infinite p gets none."""
    u = tl.where((p == 0) | (loss == INF), 0.0, d - loss)
    _, minus = wide_expm1_plus(tl.minimum(tl.maximum(d, -1.0), 1.0))
    return p * u, tl.where(tl.abs(d) < 1, p * minus, q - p)
