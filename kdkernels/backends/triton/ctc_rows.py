"""CTC, first kernel: of each frame the softmax's maximum and sum, and the probabilities of blank
and of the target's labels relative to the largest one, as numbers m * 2^e. One visit of the logits.

The softmax's sum is left out of the probabilities: occupancies do not depend on it, and the loss
adds its logarithm in float64.
"""

import triton
import triton.language as tl

from .common import (
    INF,
    LOG2E,
    ZERO_SYMBOL,
    difference,
    jit,
    scalar,
    softmax_begin,
    softmax_end,
    softmax_join,
    widened,
)
from .divergence import load_tile


@triton.jit
def target_of(n, target_lengths_ptr, target_lengths_stride, targets_n, targets_s, SIZE,
              PADDED: tl.constexpr):  # fmt: skip
    """(offset of utterance n's labels in memory, their number, whether they are within the
    targets)."""
    given = tl.load(target_lengths_ptr + n * target_lengths_stride).to(tl.int64)
    length = tl.minimum(tl.maximum(given, 0), SIZE)
    offset = n.to(tl.int64) * targets_n
    inside = given == length
    if not PADDED:
        index = tl.arange(0, 128)
        sums = tl.zeros([128], tl.int64)
        for first in range(0, n, 128):
            lengths = tl.load(
                target_lengths_ptr + (first + index) * target_lengths_stride,
                mask=first + index < n,
                other=0,
            ).to(tl.int64)
            sums += tl.minimum(tl.maximum(lengths, 0), SIZE)
        offset = tl.sum(sums)
        inside = inside & (offset + length <= SIZE)
        offset = tl.minimum(offset, SIZE)
        length = tl.minimum(length, SIZE - offset)
        offset *= targets_s
    return offset, length, inside


@triton.jit
def place(k, VECTORS: tl.constexpr, LANES: tl.constexpr):
    """Where label k stands in a row of a table: the recursion keeps VECTORS neighbours a lane, and
    reads what is in the same place of all lanes at once."""
    return (k % VECTORS) * LANES + k // VECTORS


@triton.jit
def symbol(x, top, FLOAT: tl.constexpr):
    """e^(x - top) = m * 2^e for x <= top, what the subtraction loses carried along."""
    d, lost = difference(x, top)
    possible = d > -2.3e7  # below every number that counts
    d, lost = tl.where(possible, d, -2.3e7), tl.where(possible, lost, 0.0)
    n = tl.floor(d * LOG2E + 0.5)
    if FLOAT == tl.float64:
        m = tl.exp(lost + (d - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10))
    else:
        coarse = tl.floor(n * (1.0 / 4096) + 0.5) * 4096.0  # so that each product is exact
        r = ((d - coarse * 0.693359375) - (n - coarse) * 0.693359375) + n * 2.12194440e-4 + lost
        y = r * (1.0 / 5040) + 1.0 / 720
        y = y * r + 1.0 / 120
        y = y * r + 1.0 / 24
        y = y * r + 1.0 / 6
        y = y * r + 0.5
        m = y * (r * r) + r + 1.0
    zero = x == -INF
    return tl.where(zero, 1.0, m), tl.where(zero, ZERO_SYMBOL, n.to(tl.int32))


@triton.jit
def links(n, labels_ptr, targets_s, S, next_ptr, head_ptr, most_ptr, SP: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """For each label where the next equal one stands (-1: nowhere), whether it is the first, and
    how often the commonest occurs."""
    most = 0
    for k0 in range(0, S, BLOCK):
        k = (k0 + tl.arange(0, BLOCK))[:, None]
        label_k = tl.load(labels_ptr + k * targets_s, mask=k < S, other=0).to(tl.int64)
        following = tl.full([BLOCK, 1], SP, tl.int32)
        before = tl.zeros([BLOCK, 1], tl.int32)
        for j0 in range(0, S, BLOCK):
            j = (j0 + tl.arange(0, BLOCK))[None, :]
            label_j = tl.load(labels_ptr + j * targets_s, mask=j < S, other=0).to(tl.int64)
            equal = (label_k == label_j) & (k < S) & (j < S)
            after = tl.where(equal & (j > k), j, SP)
            following = tl.minimum(following, tl.min(after, 1, keep_dims=True))
            before += tl.sum((equal & (j < k)).to(tl.int32), 1, keep_dims=True)
        row = n.to(tl.int64) * SP
        tl.store(next_ptr + row + k, tl.where(following == SP, -1, following), mask=k < S)
        tl.store(head_ptr + row + k, (before == 0).to(tl.int8), mask=k < S)
        most = tl.maximum(most, tl.max(tl.where(k < S, before, 0)))
    tl.store(most_ptr + n, most)


@jit
def ctc_rows_kernel(
    logits_ptr, stride_t, stride_n, T, N, c_units, SIZE, blank,
    targets_ptr, targets_n, targets_s, target_lengths_ptr, target_lengths_stride,
    input_lengths_ptr, input_lengths_stride, labelled_ptr, labelled_stride,
    top_ptr, rest_ptr, blank_m_ptr, blank_e_ptr, label_m_ptr, label_e_ptr,
    next_ptr, head_ptr, most_ptr, done_ptr,
    PADDED: tl.constexpr, LABELLED: tl.constexpr, LINKS: tl.constexpr, LOG: tl.constexpr,
    FLOAT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, VECTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LOG: logits less their maximum (m) in place of probabilities."""
    C = c_units * UNIT
    SP: tl.constexpr = VECTORS * LANES
    blocks = tl.cdiv(T, ROWS)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if tl.program_id(0) == 0:
        tl.store(done_ptr, 0)
    frames = tl.load(input_lengths_ptr + n * input_lengths_stride).to(tl.int64)
    frames = tl.minimum(tl.maximum(frames, 0), T)
    offset, S, _ = target_of(
        n, target_lengths_ptr, target_lengths_stride, targets_n, targets_s, SIZE, PADDED
    )
    S = tl.minimum(S, SP - 1).to(tl.int32)
    if LABELLED:
        if tl.load(labelled_ptr + n * labelled_stride) == 0:
            S = S * 0
            frames = frames * 0
    labels_ptr = targets_ptr + offset
    if LINKS:
        if block == 0:
            links(n, labels_ptr, targets_s, S, next_ptr, head_ptr, most_ptr, SP, BLOCK_S)
    if block * ROWS < frames:
        t = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        valid = t < frames
        rows = logits_ptr + (t * stride_t + n.to(tl.int64) * stride_n) * UNIT
        columns = tl.arange(0, BLOCK_C)[None, :]
        top, rest = softmax_begin(ROWS, FLOAT)
        one = scalar(1.0, FLOAT)
        for c in range(0, C, BLOCK_C):
            x = load_tile(rows, c + columns, valid, C, FLOAT)
            top, rest = softmax_join(top, rest, x, one, FLOAT)
        rest = softmax_end(top, rest)
        frame = n.to(tl.int64) * T + t
        tl.store(top_ptr + frame, top, mask=valid)
        tl.store(rest_ptr + frame, rest, mask=valid)
        blank_x = widened(tl.load(rows + blank, mask=valid, other=0), FLOAT)
        if LOG:
            tl.store(blank_m_ptr + frame, blank_x - top, mask=valid)
        else:
            blank_m, blank_e = symbol(blank_x, top, FLOAT)
            tl.store(blank_m_ptr + frame, blank_m, mask=valid)
            tl.store(blank_e_ptr + frame, blank_e, mask=valid)
        for k0 in range(0, S, BLOCK_S):
            k = k0 + tl.arange(0, BLOCK_S)[None, :]
            label = tl.load(labels_ptr + k * targets_s, mask=k < S, other=-1).to(tl.int64)
            known = (label >= 0) & (label < C)  # values on a device were not checked
            x = widened(tl.load(rows + label, mask=valid & known, other=-INF), FLOAT)
            entry = frame * SP + place(k, VECTORS, LANES)
            if LOG:
                tl.store(label_m_ptr + entry, x - top, mask=valid & (k < S))
            else:
                m, e = symbol(x, top, FLOAT)
                tl.store(label_m_ptr + entry, m, mask=valid & (k < S))
                tl.store(label_e_ptr + entry, e, mask=valid & (k < S))
