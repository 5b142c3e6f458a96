"""States of the CTC recursion: where a lane's states are, their step, a table's rows.

A state's value is m * 2^e, one exponent a state: sums are shifts of exponents and multiply-adds,
with neither exp nor log, and nothing underflows. beta is alpha of the labels and frames in reverse,
so both run the same code. States are kept as pairs (blank k, label k), VECTORS neighbouring pairs a
lane, so that each frame fetches one label from the lane before:
  x      = blank[k] + label[k - 1]
  blank' = p(blank) x
  label' = p(label) (label[k] + (may skip ? x : blank[k]))
"""

import triton
import triton.language as tl

from .common import (
    ZERO_STATE,
    ZERO_SYMBOL,
    add,
    normalised,
    power_of_two,
)
from .ctc_rows import place


@triton.jit
def lengths_of(
    n, T, N, SIZE, input_lengths_ptr, input_lengths_stride, target_lengths_ptr,
    target_lengths_stride, targets_n, targets_s, labelled_ptr, labelled_stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, LABELLED: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Of utterances n [GROUP, 1]: offset of the labels in memory, frames, labels, whether all is
    in range, whether there is a transcript, whether the tables have room for the labels."""
    here = n < N
    given_frames = tl.load(input_lengths_ptr + n * input_lengths_stride, mask=here, other=0).to(
        tl.int64
    )
    frames = tl.minimum(tl.maximum(given_frames, 0), T)
    given = tl.load(target_lengths_ptr + n * target_lengths_stride, mask=here, other=0).to(tl.int64)
    labels = tl.minimum(tl.maximum(given, 0), SIZE)
    good = (frames == given_frames) & (labels == given)
    offset = n.to(tl.int64) * targets_n
    if not PADDED:
        index = tl.arange(0, 128)[None, :]
        sums = tl.zeros([GROUP, 128], tl.int64)
        for first in range(0, N, 128):
            j = first + index
            lengths = tl.load(
                target_lengths_ptr + j * target_lengths_stride, mask=j < N, other=0
            ).to(tl.int64)
            sums += tl.where(j < n, tl.minimum(tl.maximum(lengths, 0), SIZE), 0)
        offset = tl.sum(sums, 1, keep_dims=True)
        good = good & (offset + labels <= SIZE)
        offset = tl.minimum(offset, SIZE)
        labels = tl.minimum(labels, SIZE - offset)
        offset *= targets_s
    transcript = here
    if LABELLED:
        transcript = here & (tl.load(labelled_ptr + n * labelled_stride, mask=here, other=0) != 0)
        labels = tl.where(transcript, labels, 0)
    # More labels than frames cannot be aligned: those past the table are never needed.
    short = labels < SP
    labels = tl.minimum(labels, SP - 1)
    return offset, frames.to(tl.int32), labels.to(tl.int32), good, transcript, short


@triton.jit
def checked_labels(
    labels_ptr, targets_s, S, C, blank, frames, good, short, lane, VECTORS: tl.constexpr
):
    """What `lengths_of` said, labels looked at too: whether all is in range, and whether the frames
    suffice."""
    wrong, repeats = tl.zeros_like(S), tl.zeros_like(S)
    for r in tl.static_range(VECTORS):
        k = lane * VECTORS + r
        label = tl.load(labels_ptr + k * targets_s, mask=k < S, other=-1).to(tl.int64)
        before = tl.load(labels_ptr + (k - 1) * targets_s, mask=(k > 0) & (k < S), other=-1)
        bad = (k < S) & ((label < 0) | (label >= C) | (label == blank))
        same = (k > 0) & (k < S) & (label == before.to(tl.int64))
        wrong = tl.maximum(wrong, tl.max(bad.to(tl.int32), 1, keep_dims=True))
        repeats += tl.sum(same.to(tl.int32), 1, keep_dims=True)
    return good & (wrong == 0), short & (frames >= S + repeats)


@triton.jit
def advance(state, emission, skip, first, lane, GROUP: tl.constexpr, LANES: tl.constexpr,
            VECTORS: tl.constexpr, FLOAT: tl.constexpr):  # fmt: skip
    """One frame: the values before its symbol, and after it."""
    blank_m, blank_e, label_m, label_e = state
    p_m, p_e, q_m, q_e = emission
    before_m = tl.gather(label_m[VECTORS - 1], lane, 1)
    before_e = tl.where(first, ZERO_STATE, tl.gather(label_e[VECTORS - 1], lane, 1))
    x_m, x_e, y_m, y_e = (), (), (), ()
    new_blank_m, new_blank_e, new_label_m, new_label_e = (), (), (), ()
    for r in tl.static_range(VECTORS):
        xm, xe = add(blank_m[r], blank_e[r], before_m, before_e, FLOAT)
        from_m = tl.where(skip[r], xm, blank_m[r])
        from_e = tl.where(skip[r], xe, blank_e[r])
        ym, ye = add(label_m[r], label_e[r], from_m, from_e, FLOAT)
        before_m, before_e = label_m[r], label_e[r]
        x_m, x_e, y_m, y_e = x_m + (xm,), x_e + (xe,), y_m + (ym,), y_e + (ye,)
        new_blank_m, new_blank_e = new_blank_m + (xm * p_m,), new_blank_e + (xe + p_e,)
        new_label_m, new_label_e = new_label_m + (ym * q_m[r],), new_label_e + (ye + q_e[r],)
    return (x_m, x_e, y_m, y_e), (new_blank_m, new_blank_e, new_label_m, new_label_e)


@triton.jit
def chosen(condition, a, b, VECTORS: tl.constexpr):
    """State a where the condition holds, else b."""
    blank_m, blank_e, label_m, label_e = (), (), (), ()
    for r in tl.static_range(VECTORS):
        blank_m = blank_m + (tl.where(condition, a[0][r], b[0][r]),)
        blank_e = blank_e + (tl.where(condition, a[1][r], b[1][r]),)
        label_m = label_m + (tl.where(condition, a[2][r], b[2][r]),)
        label_e = label_e + (tl.where(condition, a[3][r], b[3][r]),)
    return blank_m, blank_e, label_m, label_e


@triton.jit
def normal(state, VECTORS: tl.constexpr, FLOAT: tl.constexpr):
    blank_m, blank_e, label_m, label_e = (), (), (), ()
    for r in tl.static_range(VECTORS):
        m, e = normalised(state[0][r], state[1][r], FLOAT)
        blank_m, blank_e = blank_m + (m,), blank_e + (e,)
        m, e = normalised(state[2][r], state[3][r], FLOAT)
        label_m, label_e = label_m + (m,), label_e + (e,)
    return blank_m, blank_e, label_m, label_e


@triton.jit
def symbols_at(tables, frame, valid, at, inside, VECTORS: tl.constexpr, SP: tl.constexpr):
    """Probabilities at a frame (its row of the tables, [GROUP, 1])."""
    blank_m_ptr, blank_e_ptr, label_m_ptr, label_e_ptr = tables
    q_m, q_e = (), ()
    for r in tl.static_range(VECTORS):
        entry = frame * SP + at[r]
        q_m = q_m + (tl.load(label_m_ptr + entry, mask=valid & inside[r], other=1),)
        q_e = q_e + (tl.load(label_e_ptr + entry, mask=valid & inside[r], other=ZERO_SYMBOL),)
    return (
        tl.load(blank_m_ptr + frame, mask=valid, other=1),
        tl.load(blank_e_ptr + frame, mask=valid, other=0),
        q_m,
        q_e,
    )


@triton.jit
def store_state(ptrs, state, offset, at, mask, VECTORS: tl.constexpr, SP: tl.constexpr):
    m_ptr, e_ptr = ptrs
    for r in tl.static_range(VECTORS):
        tl.store(m_ptr + offset + at[r], state[0][r], mask=mask)
        tl.store(e_ptr + offset + at[r], state[1][r], mask=mask)
        tl.store(m_ptr + offset + SP + at[r], state[2][r], mask=mask)
        tl.store(e_ptr + offset + SP + at[r], state[3][r], mask=mask)


@triton.jit
def load_state(ptrs, offset, blank_at, blank_in, label_at, label_in, mask,
               VECTORS: tl.constexpr, SP: tl.constexpr):  # fmt: skip
    m_ptr, e_ptr = ptrs
    blank_m, blank_e, label_m, label_e = (), (), (), ()
    for r in tl.static_range(VECTORS):
        b, l = mask & blank_in[r], mask & label_in[r]
        blank, label = offset + blank_at[r], offset + SP + label_at[r]
        blank_m = blank_m + (tl.load(m_ptr + blank, mask=b, other=1),)
        blank_e = blank_e + (tl.load(e_ptr + blank, mask=b, other=ZERO_STATE),)
        label_m = label_m + (tl.load(m_ptr + label, mask=l, other=1),)
        label_e = label_e + (tl.load(e_ptr + label, mask=l, other=ZERO_STATE),)
    return blank_m, blank_e, label_m, label_e


@triton.jit
def begin(lane, GROUP: tl.constexpr, LANES: tl.constexpr, VECTORS: tl.constexpr,
          FLOAT: tl.constexpr):  # fmt: skip
    """All mass in the first blank."""
    one = tl.full([GROUP, LANES], 1, FLOAT)
    zero = tl.full([GROUP, LANES], ZERO_STATE, tl.int32)
    blank_m, blank_e, label_m, label_e = (), (), (), ()
    for r in tl.static_range(VECTORS):
        e = zero
        if r == 0:
            e = tl.where(lane == 0, 0, zero)
        blank_m, blank_e = blank_m + (one,), blank_e + (e,)
        label_m, label_e = label_m + (one,), label_e + (zero,)
    return blank_m, blank_e, label_m, label_e


@triton.jit
def lattice(labels_ptr, targets_s, S, backward, lane, VECTORS: tl.constexpr, LANES: tl.constexpr):
    """Of a chain's pairs: place of the label in a table and whether there is one, of the blank and
    of the label in the other chain's rows, and whether the label before may be skipped to it."""
    at, inside, skip = (), (), ()
    blank_at, blank_in, label_at = (), (), ()
    for r in tl.static_range(VECTORS):
        k = lane * VECTORS + r
        label_k = tl.where(backward, S - 1 - k, k)
        before = tl.where(backward, S - k, k - 1)
        here = k < S
        label = tl.load(labels_ptr + label_k * targets_s, mask=here, other=0)
        last = tl.load(labels_ptr + before * targets_s, mask=here & (k > 0), other=0)
        inside = inside + (here,)
        skip = skip + (here & (k > 0) & (label != last),)
        at = at + (place(tl.where(here, label_k, 0), VECTORS, LANES),)
        blank_in = blank_in + (k <= S,)
        blank_at = blank_at + (place(tl.where(k <= S, S - k, 0), VECTORS, LANES),)
        label_at = label_at + (place(tl.where(here, S - 1 - k, 0), VECTORS, LANES),)
    return at, inside, skip, blank_at, blank_in, label_at


@triton.jit
def own_places(lane, VECTORS: tl.constexpr, LANES: tl.constexpr):
    at = ()
    for r in tl.static_range(VECTORS):
        at = at + (r * LANES + lane,)
    return at


@triton.jit
def product(x, other, VECTORS: tl.constexpr, FLOAT: tl.constexpr):
    """Sum over states of the products of two rows: (m, e), [GROUP, 1]."""
    m, e = normalised(x[0][0] * other[0][0], x[1][0] + other[1][0], FLOAT)
    e = tl.maximum(e, 2 * ZERO_STATE)
    for r in tl.static_range(VECTORS):
        if r > 0:
            m, e = add(m, e, x[0][r] * other[0][r], x[1][r] + other[1][r], FLOAT)
        m, e = add(m, e, x[2][r] * other[2][r], x[3][r] + other[3][r], FLOAT)
    top = tl.max(e, 1, keep_dims=True)
    return tl.sum(m * power_of_two(e - top, FLOAT), 1, keep_dims=True), top
