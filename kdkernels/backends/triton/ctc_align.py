"""ctc_align: the best path of each utterance (Viterbi), in float64 log space so that it is the best
one. Stored: one byte a state and frame, saying where its best path came from.
"""

import torch
import triton
import triton.language as tl

from kdkernels.backends._codes import float_dtype

from .common import GROUP, INF, jit, on_its_device, tile_of, tl_dtype, unit_of
from .ctc_loss import Problem, frame_strides
from .ctc_rows import ctc_rows_kernel
from .ctc_states import checked_labels, lattice, lengths_of, own_places


@jit
def ctc_align_kernel(
    T, N, SIZE, C, blank, targets_ptr, targets_n, targets_s,
    target_lengths_ptr, target_lengths_stride, input_lengths_ptr, input_lengths_stride,
    labelled_ptr, labelled_stride, rest_ptr, blank_ptr, label_ptr, moves_ptr, paths_ptr,
    scores_ptr, PADDED: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """Moves: how many states back the best path was, of the 2S + 1."""
    SP: tl.constexpr = VECTORS * LANES
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    offset, frames, S, good, _, short = lengths_of(
        n, T, N, SIZE, input_lengths_ptr, input_lengths_stride, target_lengths_ptr,
        target_lengths_stride, targets_n, targets_s, labelled_ptr, labelled_stride, GROUP, PADDED,
        False, SP,
    )  # fmt: skip
    labels_ptr = targets_ptr + offset
    good, fits = checked_labels(
        labels_ptr, targets_s, S, C, blank, frames, good, short, lane, VECTORS
    )
    at, inside, skip, _, _, _ = lattice(labels_ptr, targets_s, S, n < 0, lane, VECTORS, LANES)
    own = own_places(lane, VECTORS, LANES)
    before = tl.maximum(lane - 1, 0) + tl.zeros([GROUP, 1], tl.int32)
    none = tl.full([GROUP, LANES], -INF, tl.float64)
    blanks, labels = (), ()
    for r in tl.static_range(VECTORS):
        blanks = blanks + (tl.where(lane == 0, 0.0, none) if r == 0 else none,)
        labels = labels + (none,)
    longest = tl.max(tl.where(n < N, frames, 0))
    for t in range(0, longest):
        here = (n < N) & (t < frames)
        frame = n.to(tl.int64) * T + t
        rest = tl.load(rest_ptr + frame, mask=here, other=0).to(tl.float64)
        u = 1 + rest
        log_sum = tl.log(u) - ((u - 1) - rest) / u
        blank_here = tl.load(blank_ptr + frame, mask=here, other=0).to(tl.float64) - log_sum
        last = tl.where(lane == 0, -INF, tl.gather(labels[VECTORS - 1], before, 1))
        new_blanks, new_labels = (), ()
        for r in tl.static_range(VECTORS):
            label_here = (
                tl.load(label_ptr + frame * SP + at[r], mask=here & inside[r], other=-INF).to(
                    tl.float64
                )
                - log_sum
            )
            b, l = blanks[r], labels[r]
            move = frame * (2 * SP) + own[r]
            tl.store(moves_ptr + move, (last > b).to(tl.int8), mask=here)
            best = tl.maximum(l, b)
            jump = skip[r] & (last > best)
            tl.store(
                moves_ptr + move + SP,
                tl.where(jump, 2, (b > l).to(tl.int32)).to(tl.int8),
                mask=here,
            )
            new_b = tl.maximum(b, last) + blank_here
            new_l = tl.where(jump, last, best) + label_here
            last = l
            new_blanks = new_blanks + (tl.where(here, new_b, b),)
            new_labels = new_labels + (tl.where(here, new_l, l),)
        blanks, labels = new_blanks, new_labels

    end_blank, end_label = none, none
    nan = tl.zeros([GROUP, 1], tl.int32)
    for r in tl.static_range(VECTORS):
        k = lane * VECTORS + r
        end_blank = tl.where(k == S, blanks[r], end_blank)
        end_label = tl.where(k == S - 1, labels[r], end_label)
        nan = tl.maximum(nan, tl.max((blanks[r] != blanks[r]).to(tl.int32), 1, keep_dims=True))
    end_blank = tl.max(end_blank, 1, keep_dims=True)
    end_label = tl.max(end_label, 1, keep_dims=True)
    score = tl.where(nan == 0, tl.maximum(end_blank, end_label), float("nan"))
    score = tl.where(good, tl.where(fits, score, -INF), float("nan"))
    tl.store(scores_ptr + n, score, mask=n < N)
    state = tl.where(end_blank >= end_label, 2 * S, 2 * S - 1)
    possible = (n < N) & (score > -INF)
    tl.debug_barrier()  # moves were stored by other threads
    for back in range(0, T):
        now = T - 1 - back
        alive = possible & (now < frames)
        position = state // 2
        on_label = state % 2
        found = tl.load(labels_ptr + position * targets_s, mask=alive & (on_label == 1), other=0)
        value = tl.where(alive, tl.where(on_label == 1, found.to(tl.int64), blank), -1)
        tl.store(paths_ptr + n.to(tl.int64) * T + now, value, mask=n < N)
        place = (position % VECTORS) * LANES + position // VECTORS + on_label * SP
        moved = tl.load(
            moves_ptr + (n.to(tl.int64) * T + now) * (2 * SP) + place, mask=alive, other=0
        )
        state = state - moved.to(tl.int32)


@on_its_device
@torch.no_grad()
def ctc_align(logits, targets, input_lengths, target_lengths, blank):
    T, N, C = logits.shape
    device, dtype = logits.device, float_dtype(logits)
    paths = torch.empty((N, T), dtype=torch.int64, device=device)
    scores = torch.empty(N, dtype=dtype, device=device)
    if not N:
        return paths, scores
    p = Problem(logits, targets, input_lengths, target_lengths)
    frames = max(T, 1)
    top, rest, blanks = (torch.empty((N, frames), dtype=dtype, device=device) for _ in range(3))
    labels = torch.empty((N, frames, p.width), dtype=dtype, device=device)
    moves = torch.empty((N, frames, 2, p.width), dtype=torch.int8, device=device)
    done = torch.empty(1, dtype=torch.int32, device=device)
    unit = unit_of(C, logits)
    rows, block_c, warps = tile_of(frames, C)
    lengths = (*p.targets, *p.target_lengths, *p.input_lengths, *p.labelled)
    ctc_rows_kernel[(N * triton.cdiv(frames, rows),)](
        logits, *frame_strides(logits, unit), frames, N, C // unit, p.size, blank, *lengths,
        top, rest, blanks, done, labels, done, done, done, done, done,
        *p.flags, False, True, tl_dtype(dtype), unit, rows, block_c, min(64, p.width),
        p.vectors, p.lanes, num_warps=warps,
    )  # fmt: skip
    group = min(GROUP, triton.next_power_of_2(N))
    ctc_align_kernel[(triton.cdiv(N, group),)](
        T, N, p.size, C, blank, *lengths, rest, blanks, labels, moves, paths, scores,
        p.padded, group, p.lanes, p.vectors, num_warps=p.warps,
    )  # fmt: skip
    return paths, scores
