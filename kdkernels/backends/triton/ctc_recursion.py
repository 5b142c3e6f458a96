"""CTC, second and third kernel: alpha from the front and beta from the back, a chain of each for
every utterance, which meet in the middle; then each goes on through the other's half and turns the
other's stored rows into occupancies. Only half of each table is ever stored.
"""

import triton
import triton.language as tl

from .common import (
    INF,
    LN2,
    ZERO_LIKELIHOOD,
    jit,
    power_of_two,
)
from .ctc_states import (
    advance,
    begin,
    checked_labels,
    chosen,
    lattice,
    lengths_of,
    load_state,
    normal,
    own_places,
    product,
    store_state,
    symbols_at,
)

AHEAD = tl.constexpr(4)  # frames whose symbols are loaded before they are needed


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
    good, fits = checked_labels(
        labels_ptr, targets_s, S, C, blank, frames, good, short, lane, VECTORS
    )
    front = (n < N) & (chain % 2 == 0)
    tl.store(fault_ptr + n, tl.where(good, tl.where(fits, 0, 2), 1).to(tl.int32), mask=front)
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
    rows = chain.to(tl.int64) * ((T + 1) // 2)
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
                (rows_m_ptr, rows_e_ptr), state, (rows + i + j) * (2 * SP), own, here & kept,
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
        other_last = (chain + direction).to(tl.int64) * size + frames - 1
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
                rows, (other_last - i) * (2 * SP), blank_at, blank_in, label_at,
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
