"""CTC, second and third kernel: alpha from the front and beta from the back, a chain of each for
every utterance, which meet in the middle; then each goes on through the other's half and turns the
other's stored rows into occupancies. Only half of each table is ever stored.

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
    INF,
    LN2,
    ZERO_LIKELIHOOD,
    ZERO_STATE,
    ZERO_SYMBOL,
    add,
    jit,
    normalised,
    power_of_two,
)
from .ctc_rows import place

AHEAD = tl.constexpr(4)  # frames whose symbols are loaded before they are needed


@triton.jit
def lengths_of(
    n, T, N, SIZE, input_lengths_ptr, input_lengths_stride, target_lengths_ptr,
    target_lengths_stride, targets_n, targets_s, labelled_ptr, labelled_stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, LABELLED: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Of utterances n [GROUP, 1]: offset of the labels in memory, frames, labels, whether all is
    in range, whether there is a transcript."""
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


@jit
def ctc_first_kernel(
    T, N, SIZE, C, blank, targets_ptr, targets_n, targets_s,
    target_lengths_ptr, target_lengths_stride, input_lengths_ptr, input_lengths_stride,
    labelled_ptr, labelled_stride, blank_m_ptr, blank_e_ptr, label_m_ptr, label_e_ptr,
    rows_m_ptr, rows_e_ptr, fault_ptr, weight_ptr, weight_t, weight_n, weight_sum_ptr,
    PADDED: tl.constexpr, LABELLED: tl.constexpr, WEIGHTED: tl.constexpr, FLOAT: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """The first halves of GROUP chains. Besides: which utterances have values that cannot be, and
    the sums of their frames' weights."""
    SP: tl.constexpr = VECTORS * LANES
    chain = tl.program_id(0) * GROUP + tl.arange(0, GROUP)[:, None]
    n, backward = chain // 2, chain % 2 == 1
    lane = tl.arange(0, LANES)[None, :]
    offset, frames, S, good, transcript, short = lengths_of(
        n, T, N, SIZE, input_lengths_ptr, input_lengths_stride, target_lengths_ptr,
        target_lengths_stride, targets_n, targets_s, labelled_ptr, labelled_stride,
        GROUP, PADDED, LABELLED, SP,
    )  # fmt: skip
    labels_ptr = targets_ptr + offset
    good = tl.where(good, 1, 0)
    for r in tl.static_range(VECTORS):
        k = lane * VECTORS + r
        label = tl.load(labels_ptr + k * targets_s, mask=k < S, other=-1).to(tl.int64)
        wrong = (k < S) & ((label < 0) | (label >= C) | (label == blank))
        good = tl.minimum(good, 1 - tl.max(wrong.to(tl.int32), 1, keep_dims=True))
    front = (n < N) & (chain % 2 == 0)
    tl.store(fault_ptr + n, tl.where(good == 1, tl.where(short, 0, 2), 1).to(tl.int32), mask=front)
    index = tl.arange(0, 128)[None, :]
    total = tl.zeros([GROUP, 1], tl.float64)
    if WEIGHTED:
        for first in range(0, T, 128):
            t = first + index
            weight = tl.load(
                weight_ptr + t.to(tl.int64) * weight_t + n.to(tl.int64) * weight_n,
                mask=front & (t < frames),
                other=0,
            ).to(tl.float64)
            total += tl.sum(weight, 1, keep_dims=True)
    else:
        total = frames.to(tl.float64)
    tl.store(weight_sum_ptr + n, total, mask=front)

    half = frames // 2
    steps = tl.where((n < N) & transcript, tl.where(backward, frames - half, half), 0)
    at, inside, skip, _, _, _ = lattice(labels_ptr, targets_s, S, backward, lane, VECTORS, LANES)
    own = own_places(lane, VECTORS, LANES)
    kept = lane * VECTORS <= S
    tables = (blank_m_ptr, blank_e_ptr, label_m_ptr, label_e_ptr)
    rows = chain.to(tl.int64) * ((T + 1) // 2) * (2 * SP)
    origin = n.to(tl.int64) * T + tl.where(backward, frames - 1, 0)
    direction = tl.where(backward, -1, 1)
    before = tl.maximum(lane - 1, 0) + tl.zeros([GROUP, 1], tl.int32)
    state = begin(lane, GROUP, LANES, VECTORS, FLOAT)
    for i in range(0, tl.max(steps), AHEAD):
        for j in tl.static_range(AHEAD):
            here = i + j < steps
            emission = symbols_at(
                tables, origin + (i + j) * direction, here, at, inside, VECTORS, SP
            )
            new = advance(state, emission, skip, lane == 0, before, GROUP, LANES, VECTORS, FLOAT)[1]
            state = chosen(here, new, state, VECTORS)
            store_state(
                (rows_m_ptr, rows_e_ptr), state, rows + (i + j) * (2 * SP), own, here & kept,
                VECTORS, SP,
            )  # fmt: skip
        state = normal(state, VECTORS, FLOAT)


@triton.jit
def meet(n, half, frames, S, T, labels_ptr, targets_s, tables, rows, lane, before,
         GROUP: tl.constexpr, LANES: tl.constexpr, VECTORS: tl.constexpr,
         FLOAT: tl.constexpr):  # fmt: skip
    """The likelihood of utterances n, from the last rows of their two chains: (m, e)."""
    SP: tl.constexpr = VECTORS * LANES
    at, inside, skip, blank_at, blank_in, label_at = lattice(
        labels_ptr, targets_s, S, n < 0, lane, VECTORS, LANES
    )
    own = own_places(lane, VECTORS, LANES)
    some = frames > 0
    size = (T + 1) // 2
    at_half = (2 * n.to(tl.int64) * size + half - 1) * (2 * SP)
    at_end = ((2 * n.to(tl.int64) + 1) * size + frames - half - 1) * (2 * SP)
    stored = load_state(rows, at_half, own, blank_in, own, blank_in, half > 0, VECTORS, SP)
    state = chosen(half > 0, stored, begin(lane, GROUP, LANES, VECTORS, FLOAT), VECTORS)
    emission = symbols_at(tables, n.to(tl.int64) * T + half, some, at, inside, VECTORS, SP)
    x, _ = advance(state, emission, skip, lane == 0, before, GROUP, LANES, VECTORS, FLOAT)
    other = load_state(rows, at_end, blank_at, blank_in, label_at, inside, some, VECTORS, SP)
    return product(x, other, VECTORS, FLOAT)


@triton.jit
def small_loss(frames, labels_ptr, targets_s, S, n, T, tables, lane, before, on,
               GROUP: tl.constexpr, LANES: tl.constexpr, VECTORS: tl.constexpr):  # fmt: skip
    """log2 of the likelihood in plain float64, in which nothing that counts can underflow where
    the loss is small: the rounding of float32 mantissas, 1e-7 a frame, would show there."""
    SP: tl.constexpr = VECTORS * LANES
    at, inside, skip, _, _, _ = lattice(labels_ptr, targets_s, S, n < 0, lane, VECTORS, LANES)
    zero = tl.zeros([GROUP, LANES], tl.float64)
    blank, label = (), ()
    for r in tl.static_range(VECTORS):
        blank = blank + (tl.where(lane == 0, 1.0, zero) if r == 0 else zero,)
        label = label + (zero,)
    for i in range(0, tl.max(tl.where(on, frames, 0))):
        here = on & (i < frames)
        p_m, p_e, q_m, q_e = symbols_at(
            tables, n.to(tl.int64) * T + i, here, at, inside, VECTORS, SP
        )
        p = p_m.to(tl.float64) * power_of_two(p_e, tl.float64)
        last = tl.where(lane == 0, 0.0, tl.gather(label[VECTORS - 1], before, 1))
        new_blank, new_label = (), ()
        for r in tl.static_range(VECTORS):
            q = q_m[r].to(tl.float64) * power_of_two(q_e[r], tl.float64)
            x = blank[r] + last
            y = (label[r] + tl.where(skip[r], x, blank[r])) * q
            new_blank = new_blank + (tl.where(here, x * p, blank[r]),)
            new_label = new_label + (tl.where(here, y, label[r]),)
            last = label[r]
        blank, label = new_blank, new_label
    total = zero
    for r in tl.static_range(VECTORS):
        k = lane * VECTORS + r
        total += tl.where(k == S, blank[r], 0.0) + tl.where(k == S - 1, label[r], 0.0)
    return tl.log(tl.sum(total, 1, keep_dims=True))


@jit
def ctc_second_kernel(
    T, N, SIZE, targets_ptr, targets_n, targets_s,
    target_lengths_ptr, target_lengths_stride, input_lengths_ptr, input_lengths_stride,
    labelled_ptr, labelled_stride, blank_m_ptr, blank_e_ptr, label_m_ptr, label_e_ptr,
    rows_m_ptr, rows_e_ptr, fault_ptr, weight_sum_ptr, rest_ptr, gamma_ptr,
    loss_ptr, ctc_factor_ptr, kd_factor_ptr, ctc_weight: tl.float64, kd_weight: tl.float64,
    PADDED: tl.constexpr, LABELLED: tl.constexpr, MEAN: tl.constexpr, KD: tl.constexpr,
    ZERO_INFINITY: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """The second halves of GROUP chains, and, from programs of their own, the losses of GROUP
    utterances with the factors of their gradients: along axis 1 losses come first."""
    SP: tl.constexpr = VECTORS * LANES
    lane = tl.arange(0, LANES)[None, :]
    before = tl.maximum(lane - 1, 0) + tl.zeros([GROUP, 1], tl.int32)
    tables = (blank_m_ptr, blank_e_ptr, label_m_ptr, label_e_ptr)
    rows = (rows_m_ptr, rows_e_ptr)
    chains = tl.program_id(1) == 1
    chain = tl.program_id(0) * GROUP + tl.arange(0, GROUP)[:, None]
    n = tl.where(chains, chain // 2, chain)
    backward = chains & (chain % 2 == 1)
    offset, frames, S, _, transcript, _ = lengths_of(
        n, T, N, SIZE, input_lengths_ptr, input_lengths_stride, target_lengths_ptr,
        target_lengths_stride, targets_n, targets_s, labelled_ptr, labelled_stride,
        GROUP, PADDED, LABELLED, SP,
    )  # fmt: skip
    labels_ptr = targets_ptr + offset
    half = frames // 2
    runs = (n < N) & transcript & (frames > 0)
    size = (T + 1) // 2
    if chains:
        at, inside, skip, blank_at, blank_in, label_at = lattice(
            labels_ptr, targets_s, S, backward, lane, VECTORS, LANES
        )
        own = own_places(lane, VECTORS, LANES)
        first = tl.where(backward, frames - half, half)
        steps = tl.where(runs, frames - first, 0)
        origin = n.to(tl.int64) * T + tl.where(backward, frames - 1, 0)
        direction = tl.where(backward, -1, 1)
        mine = (chain.to(tl.int64) * size + first - 1) * (2 * SP)
        other_rows = (chain + direction).to(tl.int64) * size * (2 * SP)
        stored = load_state(
            rows, mine, own, blank_in, own, blank_in, runs & (first > 0), VECTORS, SP
        )
        state = chosen(first > 0, stored, begin(lane, GROUP, LANES, VECTORS, FLOAT), VECTORS)
        inverse = tl.full([GROUP, 1], 0, FLOAT)
        exponent = tl.full([GROUP, 1], 0, tl.int32)
        for step in range(0, tl.max(steps)):
            here = step < steps
            i = first + step
            frame = origin + i * direction
            emission = symbols_at(tables, frame, here, at, inside, VECTORS, SP)
            other = load_state(
                rows, other_rows + (frames - 1 - i) * (2 * SP), blank_at, blank_in, label_at,
                inside, here, VECTORS, SP,
            )  # fmt: skip
            x, new = advance(state, emission, skip, lane == 0, before, GROUP, LANES, VECTORS, FLOAT)
            if step == 0:
                m, exponent = product(x, other, VECTORS, FLOAT)
                possible = (exponent >= ZERO_LIKELIHOOD) & (m > 0)
                inverse = tl.where(possible, 1 / m, 0.0)
            for r in tl.static_range(VECTORS):
                scale = power_of_two(tl.minimum(x[3][r] + other[3][r] - exponent, 100), FLOAT)
                gamma = (x[2][r] * other[2][r]) * inverse * scale
                tl.store(gamma_ptr + frame * SP + at[r], gamma, mask=here & inside[r])
            state = normal(chosen(here, new, state, VECTORS), VECTORS, FLOAT)
    else:
        m, e = meet(
            n, half, frames, S, T, labels_ptr, targets_s, tables, rows, lane, before,
            GROUP, LANES, VECTORS, FLOAT,
        )  # fmt: skip
        index = tl.arange(0, 128)[None, :]
        log_sum = tl.zeros([GROUP, 1], tl.float64)
        for t0 in range(0, tl.max(frames), 128):
            t = t0 + index
            rest = tl.load(rest_ptr + n.to(tl.int64) * T + t, mask=runs & (t < frames), other=0).to(
                tl.float64
            )
            u = 1 + rest
            log_sum += tl.sum(tl.log(u) - ((u - 1) - rest) / u, 1, keep_dims=True)
        loss = log_sum - LN2 * e.to(tl.float64) - tl.log(m.to(tl.float64))
        possible = (e >= ZERO_LIKELIHOOD) & (m > 0)
        loss = tl.where(possible | (log_sum != log_sum), loss, INF)
        if FLOAT == tl.float32:
            small = runs & (loss * loss < 0.01 * frames.to(tl.float64))
            if tl.max(small.to(tl.int32)) > 0:
                log = small_loss(
                    frames, labels_ptr, targets_s, S, n, T, tables, lane, before, small,
                    GROUP, LANES, VECTORS,
                )  # fmt: skip
                loss = tl.where(small, log_sum - log, loss)
        fault = tl.load(fault_ptr + n, mask=n < N, other=0)
        loss = tl.where(frames > 0, loss, tl.where(S == 0, 0.0, INF))
        loss = tl.where(fault == 2, INF, loss)
        loss = tl.where(transcript, tl.where(fault == 1, float("nan"), loss), 0.0)
        factor = tl.where(loss == INF, 0.0, tl.where(loss != loss, float("nan"), 1.0))
        factor = factor.to(tl.float64) * ctc_weight
        factor = tl.where(transcript & (ctc_weight != 0), factor, 0.0)
        if ZERO_INFINITY:
            loss = tl.where(loss == INF, 0.0, loss)
        labelled = N.to(tl.float64)
        kd_factor = tl.full([GROUP, 1], kd_weight, tl.float64)
        if MEAN and LABELLED:
            count = tl.zeros([1, 128], tl.int32)
            for n0 in range(0, N, 128):
                j = n0 + index
                flag = tl.load(labelled_ptr + j * labelled_stride, mask=j < N, other=0)
                count += (flag != 0).to(tl.int32)
            labelled = tl.sum(count).to(tl.float64)
        if MEAN and KD:
            total = tl.zeros([1, 128], tl.float64)
            for n0 in range(0, N, 128):
                j = n0 + index
                total += tl.load(weight_sum_ptr + j, mask=j < N, other=0)
            weights = tl.sum(total)
            kd_factor = tl.where(weights == 0, 0.0, kd_factor / weights)
        if MEAN:
            given = tl.load(target_lengths_ptr + n * target_lengths_stride, mask=n < N, other=1).to(
                tl.float64
            )
            factor = factor / (labelled * tl.maximum(given, 1.0))
            factor = tl.where(labelled == 0, 0.0, factor)
        tl.store(loss_ptr + n, loss, mask=n < N)
        tl.store(ctc_factor_ptr + n, factor, mask=n < N)
        tl.store(kd_factor_ptr + n, kd_factor, mask=n < N)
