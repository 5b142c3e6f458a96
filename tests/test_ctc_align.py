import math

import pytest
import torch
from helpers import REGIMES, collapse, ctc_oracle, enumerate_paths, problem, randn, strided
from tolerances import DTYPES, TOLERANCES, assert_loss

OPS = ("ctc_posteriors", "ctc_align")


def scores_of(logits, paths, input_lengths):
    """Log-probability of each path, in float64."""
    log_probs = logits.double().cpu().log_softmax(-1)
    return torch.stack(
        [
            log_probs[: int(T), n].gather(1, paths[n, : int(T), None].cpu()).sum()
            for n, T in enumerate(input_lengths)
        ]
    )


def viterbi(log_probs, labels):
    """Score of the best path, by the textbook recursion; log_probs [T][C], blank 0."""
    states = [0]
    for label in labels:
        states += [label, 0]
    best = [log_probs[0][c] if i < 2 else -math.inf for i, c in enumerate(states)]
    for row in log_probs[1:]:
        new = []
        for i, c in enumerate(states):
            before = [best[i]] + ([best[i - 1]] if i else [])
            if i > 1 and c != 0 and c != states[i - 2]:
                before.append(best[i - 2])
            new.append(max(before) + row[c])
        best = new
    return max(best[-2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_posteriors_are_softmax_minus_gradient(on, dtype):
    p = problem(T=40, N=4, seed=1)
    p = p._replace(logits=p.logits.to(dtype))
    gamma = on.ctc_posteriors(p.logits.to(on.device), *p.rest)
    assert gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not gamma.requires_grad
    _, grad = ctc_oracle(p)
    valid = torch.arange(40)[:, None] < p.input_lengths
    expected = torch.where(valid[..., None], p.logits.double().softmax(-1) - grad, 0.0)
    torch.testing.assert_close(
        gamma.double().cpu(), expected, rtol=0, atol=TOLERANCES[dtype].ctc_grad
    )
    assert (gamma.cpu()[~valid] == 0).all()


@pytest.mark.parametrize("regime", REGIMES)
def test_posteriors_sum_to_one(on, regime):
    p = problem(T=60, N=3, S=8, regime=regime, seed=2)
    gamma = on.ctc_posteriors(p.logits.float().to(on.device), *p.rest)
    total = gamma.double().sum(-1).cpu()
    valid = (torch.arange(len(total))[:, None] < p.input_lengths).double()
    torch.testing.assert_close(total, valid, rtol=0, atol=TOLERANCES[torch.float32].ctc_grad)


@pytest.mark.parametrize("C", [6, 200])  # classes as symbols, and labels
def test_blank_that_cannot_occur_has_no_occupancy(on, C):
    logits = randn(4, 2, C, seed=3)
    logits[1:, :, 0] = -math.inf
    targets = torch.tensor([[1, 2, 3, 4], [2, 1, 5, 2]])
    gamma = on.ctc_posteriors(logits.float().to(on.device), targets, [4, 4], [4, 3])
    assert (gamma[1:, :, 0] == 0).all()
    assert gamma[0, 1, 0] > 0
    torch.testing.assert_close(gamma.sum(-1).cpu(), torch.ones(4, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("T", "target"), [(1, []), (1, [1]), (3, [1, 1]), (4, [1, 2]), (5, [2, 2, 1]), (6, [1, 2, 1])]
)
@pytest.mark.parametrize("blank", [0, 2])
def test_every_path(on, T, target, blank):
    target = [(c + blank) % 3 for c in target]
    logits = randn(T, 1, 3, seed=T + 10)
    every = enumerate_paths(logits.log_softmax(-1)[:, 0].tolist(), target, blank)
    best = max(every, key=every.get)
    total = sum(math.exp(v) for v in every.values())
    expected = torch.zeros(T, 1, 3, dtype=torch.float64)
    for path, value in every.items():
        for t, c in enumerate(path):
            expected[t, 0, c] += math.exp(value) / total
    arguments = (logits.to(on.device), torch.tensor([target], dtype=torch.long), [T], [len(target)])
    paths, scores = on.ctc_align(*arguments, blank)
    assert tuple(paths[0].tolist()) == best
    assert scores.item() == pytest.approx(every[best], rel=1e-12)
    gamma = on.ctc_posteriors(*arguments, blank)
    torch.testing.assert_close(gamma.cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_best_path(on, dtype, regime):
    p = problem(T=50, N=4, C=9, S=8, regime=regime, seed=3)
    p = p._replace(logits=p.logits.to(dtype))
    paths, scores = on.ctc_align(p.logits.to(on.device), *p.rest)
    T, N = p.logits.shape[:2]
    assert paths.dtype == torch.int64
    assert paths.shape == (N, T)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    log_probs = p.logits.double().log_softmax(-1)
    for n in range(N):
        length, labels = int(p.input_lengths[n]), p.targets[n, : p.target_lengths[n]].tolist()
        assert collapse(paths[n, :length].tolist(), 0) == labels
        assert (paths[n, length:] == -1).all()
        best = torch.tensor(viterbi(log_probs[:length, n].tolist(), labels), dtype=torch.float64)
        assert_loss(scores[n], best, dtype)
    # The path is worth its score: at a near tie any of the best will do.
    assert_loss(scores_of(p.logits, paths, p.input_lengths), scores.double().cpu(), dtype)


def test_ties_stay_in_the_state(on):
    """Uniform logits: seen from the end, the path stays where it is as long as it can."""
    logits = torch.zeros(6, 1, 4, device=on.device)
    paths, scores = on.ctc_align(logits, torch.tensor([[1, 2]]), [6], [2])
    assert collapse(paths[0].tolist(), 0) == [1, 2]
    assert scores.item() == pytest.approx(-6 * math.log(4), rel=1e-6)
    again, _ = on.ctc_align(logits, torch.tensor([[1, 2]]), [6], [2])
    assert torch.equal(paths, again)


def test_layouts(on):
    p = problem(seed=4)
    x = p.logits.to(on.device)
    gamma, (paths, scores) = on.ctc_posteriors(x, *p.rest), on.ctc_align(x, *p.rest)
    first = x.transpose(0, 1).contiguous()
    assert torch.equal(on.ctc_posteriors(first, *p.rest, batch_first=True), gamma.transpose(0, 1))
    for a, b in zip(on.ctc_align(first, *p.rest, batch_first=True), (paths, scores), strict=True):
        assert torch.equal(a, b)
    wide = strided(x, "padded")
    assert torch.equal(on.ctc_posteriors(wide, *p.rest), gamma)
    T, S = int(p.input_lengths[1]), int(p.target_lengths[1])
    one = on.ctc_posteriors(x[:T, 1], p.targets[1, :S], T, S)
    torch.testing.assert_close(one, gamma[:T, 1], rtol=0, atol=1e-12)
    path, score = on.ctc_align(x[:T, 1], p.targets[1, :S], T, S)
    assert torch.equal(path, paths[1, :T])
    assert score.shape == ()


def test_target_that_cannot_be_aligned(on):
    p = problem(seed=5)
    lengths = p.input_lengths.clone()
    lengths[0] = 2
    x = p.logits.to(on.device)
    paths, scores = on.ctc_align(x, p.targets, lengths, p.target_lengths)
    assert (paths[0] == -1).all()
    assert scores[0] == -math.inf
    assert scores[1:].isfinite().all()
    gamma = on.ctc_posteriors(x, p.targets, lengths, p.target_lengths)
    assert (gamma[:, 0] == 0).all()
    assert torch.equal(gamma[:, 1:], on.ctc_posteriors(x, *p.rest)[:, 1:])


@pytest.mark.parametrize(("T", "N"), [(0, 2), (3, 0), (0, 0)])
def test_empty(on, T, N):
    x = torch.zeros(T, N, 5, device=on.device)
    arguments = (x, torch.zeros(N, 0, dtype=torch.long), [T] * N, [0] * N)
    assert on.ctc_posteriors(*arguments).shape == (T, N, 5)
    paths, scores = on.ctc_align(*arguments)
    assert paths.shape == (N, T)
    assert scores.shape == (N,)


def test_logits_that_require_grad_are_read_only(on):
    x = on.leaf(problem(seed=6).logits)
    gamma = on.ctc_posteriors(x, *problem(seed=6).rest)
    assert not gamma.requires_grad
