import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    REGIMES,
    Problem,
    ctc_oracle,
    enumerate_paths,
    frames_needed,
    problem,
    randn,
    strided,
)
from tolerances import DTYPES, assert_ctc_grad, assert_loss

import kdkernels as kd

OPS = ("ctc_loss",)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# (T, N, C, S) of the regimes: long problems teach nothing about a backend that is slow.
SHORT, EVERY_SIZE = [(60, 2, 24, 12)], [(120, 2, 24, 20), (1000, 3, 32, 150)]
LONG_SHORT, LONG = (110, 1, 16, 40), (2600, 1, 32, 1200)


def large(*values):
    """Parameters that an interpreted backend does without."""
    return [pytest.param(value, marks=pytest.mark.large) for value in values]


def check(on, p, dtype=torch.float32, reduction="sum", roundings=1, **options):
    p = p._replace(logits=p.logits.to(dtype))
    expected, grad = ctc_oracle(p, reduction)
    x = on.leaf(p.logits)
    loss = on.ctc_loss(x, *p.to(on.device, dtype).rest, reduction=reduction, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.sum().backward()
    assert x.grad.dtype == dtype
    assert_loss(loss, expected, dtype)
    assert_ctc_grad(x.grad, grad, dtype, roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torch(on, dtype, reduction):
    check(on, problem(T=40, N=4, C=17, S=9, seed=1), dtype, reduction, roundings=2)


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(on, regime):
    for seed, (T, N, C, S) in enumerate(SHORT if on.slow else EVERY_SIZE):
        check(on, problem(T, N, C, S, regime, seed))


def test_losses_that_are_next_to_nothing(on):
    """Right in nats, if not against themselves: utterances more and more certain of one path."""
    p = problem(T=25, N=12, C=7, S=6, seed=4)
    paths, _ = kd.ctc_align(p.logits, *p.rest, backend="reference")
    certainty = torch.linspace(5, 25, 12)[None, :, None]
    there = F.one_hot(paths.t().clamp(min=0), 7)
    p = p._replace(logits=(p.logits + certainty * there).float())
    expected, _ = ctc_oracle(p, "none")
    assert expected.min() < 1e-7 < 0.01 < expected.max()
    loss = on.ctc_loss(p.logits.to(on.device), *p.rest, reduction="none")
    small = expected < 0.1
    torch.testing.assert_close(loss.double().cpu()[small], expected[small], rtol=0, atol=1e-7)


@pytest.mark.parametrize("regime", ["normal", "blank_collapsed", *large("trained", "tight")])
def test_long(on, regime):
    T, N, C, S = LONG_SHORT if on.slow else LONG
    check(on, problem(T, N, C, S, regime, seed=2, full=True))


@pytest.mark.parametrize(
    ("T", "target"), [(1, []), (1, [1]), (3, [1, 1]), (4, [1, 2]), (5, [2, 2, 1]), (6, [1, 2, 1])]
)
@pytest.mark.parametrize("blank", [0, 1, 2])
def test_every_path(on, T, target, blank):
    target = [(c + blank) % 3 for c in target]
    logits = randn(T, 1, 3, seed=T)
    log_probs = logits.log_softmax(-1)[:, 0].tolist()
    paths = enumerate_paths(log_probs, target, blank)
    total = math.fsum(math.exp(v) for v in paths.values())
    occupancy = torch.zeros(T, 3, dtype=torch.float64)
    for path, value in paths.items():
        for t, c in enumerate(path):
            occupancy[t, c] += math.exp(value) / total
    x = on.leaf(logits)
    loss = on.ctc_loss(x, torch.tensor([target], dtype=torch.long), [T], [len(target)], blank)
    loss.backward()
    mean = max(len(target), 1)
    assert loss.item() == pytest.approx(-math.log(total) / mean, rel=1e-12)
    expected = (logits.softmax(-1)[:, 0] - occupancy) / mean
    torch.testing.assert_close(x.grad[:, 0].cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("T", "C", "target"),
    [
        (7, 5, []),
        (7, 5, [1]),
        (50, 29, [1, 2, 3, 4, 3]),
        (50, 29, [7, 7, 7, 2, 2]),
        (9, 4, [1, 1, 1, 1, 1]),
        pytest.param(400, 100, list(range(1, 100)), marks=pytest.mark.large),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniform_logits(on, T, C, target, dtype):
    """Every path has probability C^-T, and binom(T + S - r, 2S) paths give S labels with r
    repeats."""
    S, r = len(target), sum(a == b for a, b in itertools.pairwise(target))
    expected = T * math.log(C) - math.log(math.comb(T + S - r, 2 * S))
    logits = torch.full((T, 1, C), 0.37, dtype=dtype, device=on.device)
    targets = torch.tensor([target], dtype=torch.long)
    loss = on.ctc_loss(logits, targets, [T], [S], reduction="sum")
    assert_loss(loss, torch.tensor(expected, dtype=torch.float64), dtype)


def test_a_single_class(on):
    x = on.leaf(randn(4, 2, 1))
    loss = on.ctc_loss(x, torch.zeros(2, 0, dtype=torch.long), [4, 2], [0, 0])
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_shift_of_a_frame_changes_nothing(on):
    p = problem(seed=3)
    shifted = p.logits + 40 * randn(p.logits.shape[0], 1, 1, seed=4)
    losses = [on.ctc_loss(x.to(on.device), *p.rest, reduction="none") for x in (p.logits, shifted)]
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("blank", [1, 5, 11])
def test_permuted_classes(on, blank):
    """Class 0 and `blank` change places: the same problem."""
    p = problem(C=12, seed=5)
    order = torch.arange(12)
    order[0], order[blank] = blank, 0
    x, y = on.leaf(p.logits), on.leaf(p.logits[:, :, order])
    loss = on.ctc_loss(x, *p.rest, reduction="none")
    permuted = on.ctc_loss(y, order[p.targets], *p.rest[1:], blank=blank, reduction="none")
    torch.testing.assert_close(loss, permuted, rtol=1e-12, atol=0)
    loss.sum().backward()
    permuted.sum().backward()
    torch.testing.assert_close(x.grad[:, :, order], y.grad, rtol=0, atol=1e-12)


def test_classes_that_share_probability(on):
    """Splitting a class that the target does not use changes nothing."""
    p = problem(C=6, seed=6)
    unused = torch.full((*p.logits.shape[:2], 1), 0.8, dtype=torch.float64)
    one = torch.cat([p.logits, unused], -1).to(on.device)
    two = torch.cat([p.logits, unused - math.log(2), unused - math.log(2)], -1).to(on.device)
    losses = [on.ctc_loss(x, *p.rest, reduction="none") for x in (one, two)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_log_probabilities_are_logits(on):
    """The drop-in: F.ctc_loss's loss, and its gradient with respect to the log-probabilities."""
    p = problem(seed=7)
    ours, theirs = on.leaf(p.logits.log_softmax(-1)), p.logits.log_softmax(-1).requires_grad_()
    loss, expected = on.ctc_loss(ours, *p.rest), F.ctc_loss(theirs, *p.rest)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 18])
def test_logits_far_apart(on, seed):
    """A probability is e^-d of a d that float32 rounds by more than the result may be wrong."""
    p = problem(T=250, N=2, C=30, S=60, seed=seed)
    check(on, p._replace(logits=1000 * p.logits))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes_and_strides(on, dtype):
    p = problem(seed=8)
    expected = on.ctc_loss(p.logits.to(on.device), *p.rest)
    twice = torch.full((p.targets.shape[0], 2 * p.targets.shape[1]), 77, dtype=dtype)
    twice[:, ::2] = p.targets.to(dtype)
    for targets in (twice[:, ::2], p.targets.to(dtype).t().contiguous().t()):
        rest = (targets, p.input_lengths.to(dtype), p.target_lengths.to(dtype))
        loss = on.ctc_loss(p.logits.to(on.device), *(x.to(on.device) for x in rest))
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_label_of_an_integer_dtype(on, dtype):
    """Among them 254 and 255, which in one byte look like -2 and -1."""
    high = min(255, torch.iinfo(dtype).max)
    targets = torch.tensor([[high - 1, 7, high, 7], [high - 1, high - 1, high, high]])
    p = problem(T=20, N=2, C=256, S=4, seed=16)
    p = p._replace(targets=targets, target_lengths=torch.tensor([4, 4]))
    expected, grad = ctc_oracle(p._replace(logits=p.logits.float()), "sum")
    x = on.leaf(p.logits.float())
    targets = p.targets.to(on.device, dtype)
    loss = on.ctc_loss(x, targets, p.input_lengths, p.target_lengths, reduction="sum")
    loss.backward()
    assert_loss(loss, expected, torch.float32)
    assert_ctc_grad(x.grad, grad, torch.float32)


def test_concatenated_targets(on):
    p = problem(N=5, seed=9)
    rows = zip(p.targets, p.target_lengths, strict=True)
    targets = torch.cat([row[:n] for row, n in rows])
    x, y = on.leaf(p.logits), on.leaf(p.logits)
    loss = on.ctc_loss(x, *p.rest)
    other = on.ctc_loss(y, targets, *p.rest[1:])
    assert torch.equal(loss, other)
    loss.backward()
    other.backward()
    assert torch.equal(x.grad, y.grad)
    strided_targets = torch.stack([targets, targets], 1)[:, 0]
    assert torch.equal(loss, on.ctc_loss(y, strided_targets, *p.rest[1:]))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_lengths_as_sequences(on, kind):
    p = problem(seed=10)
    lengths = [kind(x.tolist()) for x in p.rest[1:]]
    expected = on.ctc_loss(p.logits.to(on.device), *p.rest)
    assert torch.equal(on.ctc_loss(p.logits.to(on.device), p.targets, *lengths), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("length", [int, torch.tensor, lambda n: (n,), lambda n: torch.tensor([n])])
def test_one_utterance_without_a_batch(on, reduction, length):
    p = problem(N=1, seed=11)
    T, S = p.logits.shape[0], p.targets.shape[1]
    x = on.leaf(p.logits[:, 0])
    loss = on.ctc_loss(x, p.targets[0], length(T), length(S), reduction=reduction)
    expected, grad = ctc_oracle(p, reduction)
    assert loss.shape == ()
    assert_loss(loss, expected.squeeze(), torch.float64)
    loss.backward()
    assert_ctc_grad(x.grad, grad[:, 0], torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(on, layout):
    p = problem(seed=12)
    expected, grad = ctc_oracle(p)
    x = on.leaf(strided(p.logits.to(on.device), layout))
    loss = on.ctc_loss(x, *p.rest, reduction="sum")
    loss.backward()
    assert_loss(loss, expected, torch.float64)
    assert_ctc_grad(x.grad, grad, torch.float64)


def test_batch_first(on):
    p = problem(seed=13)
    x, y = on.leaf(p.logits), on.leaf(p.logits.transpose(0, 1).contiguous())
    loss, other = on.ctc_loss(x, *p.rest), on.ctc_loss(y, *p.rest, batch_first=True)
    assert torch.equal(loss, other)
    loss.backward()
    other.backward()
    assert torch.equal(x.grad, y.grad.transpose(0, 1))


@pytest.mark.parametrize("reduction", [*large("none", "sum"), "mean"])
def test_gradcheck(on, reduction):
    p = problem(T=7, N=3, C=4, S=2, seed=14)

    def loss(x):
        return on.ctc_loss(x, *p.rest, reduction=reduction)

    assert on.gradcheck(loss, on.leaf(p.logits))


def test_any_problem(on):
    on.any_example(any_problem)


def any_problem(on, data):
    T, N = data.draw(st.integers(0, 14), label="T"), data.draw(st.integers(0, 5), label="N")
    C, S = data.draw(st.integers(2, 40), label="C"), data.draw(st.integers(0, 6), label="S")
    blank = data.draw(st.integers(0, C - 1), label="blank")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
    reduction = data.draw(st.sampled_from(["none", "sum", "mean"]), label="reduction")
    zero_infinity = data.draw(st.booleans(), label="zero_infinity")
    seed = data.draw(st.integers(0, 999), label="seed")
    g = torch.Generator().manual_seed(seed)
    # Few labels, so that there are repeats; never the blank; past a target's length anything.
    labels = [c for c in range(C) if c != blank][:3]
    targets = torch.tensor(labels)[torch.randint(len(labels), (N, S), generator=g)]
    input_lengths = torch.randint(0, T + 1, (N,), generator=g)
    target_lengths = torch.randint(0, S + 1, (N,), generator=g)
    logits = randn(T, N, C, seed=seed, scale=2).to(dtype)
    p = Problem(logits, targets, input_lengths, target_lengths)

    feasible = torch.tensor(
        [frames_needed(t, n) <= m for t, m, n in zip(*p.rest, strict=True)], dtype=torch.bool
    )
    expected, grad = torch.zeros(N, dtype=torch.float64), torch.zeros(T, N, C, dtype=torch.float64)
    for n in range(N):  # one by one: torch refuses what is empty
        if not feasible[n]:
            expected[n] = 0 if zero_infinity else math.inf
        elif input_lengths[n]:
            one = Problem(logits[: input_lengths[n], n : n + 1], *(x[n : n + 1] for x in p.rest))
            expected[n], grad_n = ctc_oracle(one, blank=blank)
            grad[: input_lengths[n], n : n + 1] = grad_n
    if reduction == "mean":
        scale = 1 / (target_lengths.clamp(min=1).double() * max(N, 1))
        expected, grad = expected * scale, grad * scale[:, None]
    past = torch.arange(S) >= target_lengths[:, None]
    targets[past] = torch.randint(-5, C + 5, (int(past.sum()),), generator=g)

    x = on.leaf(strided(logits, layout))
    loss = on.ctc_loss(x, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
    assert_loss(loss, expected if reduction == "none" else expected.sum(), dtype)
    loss.sum().backward()
    assert_ctc_grad(x.grad, grad, dtype, 2)
