"""Each edge of the documented semantics, by name."""

import math

import pytest
import torch
from conftest import Place
from helpers import Problem, ctc_oracle, kd_oracle, problem, randn
from tolerances import assert_ctc_grad, assert_kd_grad, assert_loss

import kdkernels as kd
from kdkernels import backends

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss")
NONE = {"dtype": torch.long}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def run(on, logits, *rest, **options):
    x = on.leaf(logits)
    loss = on.ctc_loss(x, *rest, **options)
    loss.sum().backward()
    return loss.detach().cpu(), x.grad.cpu()


# --------------------------------------------------------------------------- targets that cannot be


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize(
    ("T", "target"),
    [(2, [1, 2, 3]), (2, [1, 1]), (4, [1, 1, 2, 2, 3]), (1, [4, 2])],
    ids=["too_short", "repeat", "repeats", "one_frame"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_target_that_cannot_be_aligned(on, T, target, zero_infinity, dtype):
    p = problem(T=20, N=3, C=6, S=5, seed=1)
    targets, lengths = p.targets.clone(), p.input_lengths.clone()
    target_lengths = p.target_lengths.clone()
    targets[1, : len(target)] = torch.tensor(target)
    lengths[1], target_lengths[1] = T, len(target)
    options = {"reduction": "none", "zero_infinity": zero_infinity}
    loss, grad = run(on, p.logits.to(dtype), targets, lengths, target_lengths, **options)
    assert loss[1] == (0 if zero_infinity else math.inf)
    assert (grad[:, 1] == 0).all()
    others, others_grad = run(on, p.logits.to(dtype), *p.rest, **options)
    assert torch.equal(loss[[0, 2]], others[[0, 2]])
    assert torch.equal(grad[:, [0, 2]], others_grad[:, [0, 2]])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("T", "target"),
    [(2, [1, 2, 3]), (2, [1, 1]), (0, [1])],
    ids=["too_short", "repeat", "no_frame"],
)
def test_target_that_cannot_be_aligned_whatever_its_frames_hold(on, T, target, poison):
    p = problem(T=9, N=3, C=6, S=3, seed=1)
    logits, targets, lengths = p.logits.float(), p.targets.clone(), p.input_lengths.clone()
    target_lengths = p.target_lengths.clone()
    logits[:T, 1] = poison
    targets[1, : len(target)] = torch.tensor(target)
    lengths[1], target_lengths[1] = T, len(target)
    rest = (targets, lengths, target_lengths)
    loss, grad = run(on, logits, *rest, reduction="none")
    assert loss[1] == math.inf
    assert (grad[:, 1] == 0).all()
    assert loss[[0, 2]].isfinite().all()
    assert (on.ctc_posteriors(logits.to(on.device), *rest)[:, 1] == 0).all()
    paths, scores = on.ctc_align(logits.to(on.device), *rest)
    assert scores[1] == -math.inf
    assert (paths[1] == -1).all()
    assert scores[[0, 2]].isfinite().all()
    teacher = randn(*logits.shape, seed=2).float().to(on.device)
    x = on.leaf(logits)
    terms = on.ctc_kd_loss(x, teacher, *rest, kd_weight=0.0, reduction="none")
    terms.loss.sum().backward()
    assert terms.loss[1] == terms.ctc[1] == math.inf
    assert (x.grad[:, 1] == 0).all()


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_of_an_infinite_loss(on, zero_infinity, reduction):
    p = problem(seed=2)
    lengths = p.input_lengths.clone()
    lengths[0] = 1
    rest = (p.targets, lengths, p.target_lengths)
    options = {"reduction": reduction, "zero_infinity": zero_infinity}
    loss, grad = run(on, p.logits, *rest, **options)
    expected, expected_grad = ctc_oracle(p._replace(input_lengths=lengths), reduction, 0, True)
    assert_loss(loss, expected if zero_infinity else torch.tensor(math.inf), torch.float64)
    assert_ctc_grad(grad, expected_grad, torch.float64)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_needed_label_of_probability_zero(on, zero_infinity):
    p = problem(seed=3)
    logits = p.logits.clone()
    label = p.targets[0, 2]
    logits[:, 0, label] = -math.inf
    loss, grad = run(on, logits.float(), *p.rest, reduction="none", zero_infinity=zero_infinity)
    assert loss[0] == (0 if zero_infinity else math.inf)
    assert (grad[:, 0] == 0).all()
    assert loss[1:].isfinite().all()


def test_blank_of_probability_zero(on):
    """Without blank the labels must fill every frame: possible without repeats only."""
    logits = randn(5, 2, 4, seed=4, dtype=torch.float32)
    logits[:, :, 0] = -math.inf
    targets = torch.tensor([[1, 2, 3], [1, 1, 2]])
    loss, grad = run(on, logits, targets, [5, 5], [3, 3], reduction="none")
    expected, expected_grad = ctc_oracle(
        Problem(logits, targets, torch.tensor([5, 5]), torch.tensor([3, 3])), "none"
    )
    assert loss[1] == math.inf
    assert_loss(loss[0], expected[0], torch.float32)
    assert_ctc_grad(grad[:, 0], expected_grad[:, 0], torch.float32)
    assert (grad[:, 1] == 0).all()
    assert (grad[:, :, 0] == 0).all()


# ------------------------------------------------------------------------------------ empty things


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_input_length_zero(on, zero_infinity, reduction):
    logits = torch.full((4, 2, 5), math.nan)
    rest = (torch.tensor([[1], [2]]), [0, 0], [0, 1])
    loss, grad = run(on, logits, *rest, reduction=reduction, zero_infinity=zero_infinity)
    infinite = 0 if zero_infinity else math.inf
    assert loss.tolist() == ([0, infinite] if reduction == "none" else infinite)
    assert (grad == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("width", [0, 3])
def test_empty_target(on, reduction, width):
    logits = randn(6, 1, 5, seed=5)
    targets = torch.zeros(1, width, **NONE)
    loss, grad = run(on, logits, targets, [6], [0], 2, reduction)
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(loss.squeeze(), -log_probs[:, 0, 2].sum(), rtol=1e-12, atol=0)
    expected = log_probs.exp()
    expected[:, :, 2] -= 1
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_concatenated_targets_all_empty(on):
    logits = randn(6, 2, 5, seed=6)
    loss, _ = run(on, logits, torch.zeros(0, **NONE), [6, 4], [0, 0], reduction="none")
    log_probs = logits.log_softmax(-1)[:, :, 0]
    expected = -torch.stack([log_probs[:, 0].sum(), log_probs[:4, 1].sum()])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("T", "N"), [(0, 3), (5, 0), (0, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_frames_or_no_utterances(on, T, N, reduction):
    rest = (torch.zeros(N, 0, **NONE), [T] * N, [0] * N)
    expected_shape = (N,) if reduction == "none" else ()
    x, y = on.leaf(torch.zeros(T, N, 4)), torch.zeros(T, N, 4, device=on.device)
    for loss in (
        on.ctc_loss(x, *rest, reduction=reduction),
        *on.ctc_kd_loss(x, y, *rest, reduction=reduction),
    ):
        assert loss.shape == expected_shape
        assert (loss == 0).all()
        if loss.requires_grad:
            loss.sum().backward()
    assert x.grad.shape == (T, N, 4)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_kd_loss_without_rows(on, shape, reduction):
    x = on.leaf(torch.zeros(shape))
    loss = on.kd_loss(x, torch.zeros(shape, device=on.device), reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert x.grad.shape == shape


# ------------------------------------------------------------------------- what must never be read


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_frames_are_never_read(on, poison, dtype):
    p = problem(seed=7)
    logits = p.logits.to(dtype)
    padded = torch.arange(len(logits))[:, None] >= p.input_lengths
    assert padded.any()
    poisoned = logits.clone()
    poisoned[padded] = poison
    for reduction in ("none", "mean"):
        loss, grad = run(on, poisoned, *p.rest, reduction=reduction)
        expected, expected_grad = run(on, logits, *p.rest, reduction=reduction)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, expected_grad)
        assert (grad[padded] == 0).all()
    teacher = randn(*logits.shape, seed=8).to(dtype)
    poisoned_teacher = teacher.clone()
    poisoned_teacher[padded] = poison
    x, y = on.leaf(poisoned), on.leaf(poisoned_teacher)
    u, v = on.leaf(logits), on.leaf(teacher)
    one, two = on.ctc_kd_loss(x, y, *p.rest), on.ctc_kd_loss(u, v, *p.rest)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    one.loss.backward()
    two.loss.backward()
    assert torch.equal(x.grad, u.grad)
    assert torch.equal(y.grad, v.grad)
    assert (y.grad.cpu()[padded] == 0).all()


@pytest.mark.parametrize("junk", [-1, -100, 0, 12, 10**9])
def test_labels_past_the_target_are_never_looked_at(on, junk):
    p = problem(C=12, seed=9)
    targets = torch.cat([p.targets, p.targets[:, :1]], 1)
    past = torch.arange(targets.shape[1]) >= p.target_lengths[:, None]
    junked = torch.where(past, junk, targets)
    loss, grad = run(on, p.logits, junked, *p.rest[1:])
    expected, expected_grad = run(on, p.logits, *p.rest)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_of_weight_zero_are_never_read(on, poison):
    s, t = randn(4, 9, seed=10, dtype=torch.float32), randn(4, 9, seed=11, dtype=torch.float32)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0], device=on.device)
    expected_s, expected_t = on.leaf(s), on.leaf(t)
    s[1], t[3] = poison, poison
    x, y = on.leaf(s), on.leaf(t)
    for reduction in ("none", "sum", "mean", "batchmean"):
        for z in (x, y, expected_s, expected_t):
            z.grad = None
        loss = on.kd_loss(x, y, weight=weight, reduction=reduction)
        expected = on.kd_loss(expected_s, expected_t, weight=weight, reduction=reduction)
        assert torch.equal(loss, expected)
        loss.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, expected_s.grad)
        assert (x.grad[[1, 3]] == 0).all()
        assert (y.grad[[1, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_every_weight_zero(on, dtype):
    x, y = on.leaf(torch.full((3, 5), math.nan)), on.leaf(torch.full((3, 5), math.nan))
    weight = torch.zeros(3, dtype=dtype, device=on.device)
    for reduction in ("none", "sum", "mean", "batchmean"):
        loss = on.kd_loss(x, y, weight=weight, reduction=reduction)
        assert (loss == 0).all()
        x.grad = y.grad = None
        loss.sum().backward()
        assert (x.grad == 0).all()
        assert (y.grad == 0).all()


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_classes_masked_in_both(on, divergence, dtype):
    """The same as leaving them out."""
    s, t = randn(5, 12, seed=12).to(dtype), randn(5, 12, seed=13).to(dtype)
    masked = torch.zeros(12, dtype=torch.bool)
    masked[[0, 4, 11]] = True
    expected, grad_s, grad_t = kd_oracle(s[:, ~masked], t[:, ~masked], divergence=divergence)
    s[:, masked] = t[:, masked] = -math.inf
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, divergence=divergence)
    loss.backward()
    assert_loss(loss, expected, dtype, kd=True)
    for z, grad in ((x.grad.cpu(), grad_s), (y.grad.cpu(), grad_t)):
        assert (z[:, masked] == 0).all()
        assert_kd_grad(z[:, ~masked], grad, dtype, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_classes_masked_in_the_teacher(on, dtype):
    """Probability 0 in the teacher: no term in the forward KL, an infinite one in the reverse."""
    s, t = randn(5, 12, seed=14).to(dtype), randn(5, 12, seed=15).to(dtype)
    t[:, 3] = -math.inf
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    rows = torch.where(p_t > 0, p_t * (log_t - log_s), 0.0).sum(-1)
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, reduction="none")
    loss.sum().backward()
    assert_loss(loss, rows, dtype, kd=True)
    assert_kd_grad(x.grad, p_s - p_t, dtype)
    assert (y.grad[:, 3] == 0).all()
    assert y.grad.isfinite().all()
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, divergence="reverse_kl", reduction="none")
    loss.sum().backward()
    assert (loss == math.inf).all()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()
    assert (y.grad[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_classes_masked_in_the_student(on, dtype):
    s, t = randn(5, 12, seed=16).to(dtype), randn(5, 12, seed=17).to(dtype)
    s[:, 7] = -math.inf
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, reduction="none")
    loss.sum().backward()
    assert (loss == math.inf).all()
    p_s, p_t = s.double().softmax(-1), t.double().softmax(-1)
    expected = p_s - p_t
    expected[:, 7] = 0
    assert_kd_grad(x.grad, expected, dtype)
    assert y.grad.isfinite().all()
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, divergence="reverse_kl", reduction="none")
    loss.sum().backward()
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    rows = torch.where(p_s > 0, p_s * (log_s - log_t), 0.0).sum(-1)
    assert_loss(loss, rows, dtype, kd=True)
    assert (x.grad[:, 7] == 0).all()
    assert_kd_grad(y.grad, p_t - p_s, dtype)


@pytest.mark.parametrize("C", [3, 20, 300])
def test_classes_masked_in_a_teacher_that_is_close(on, C):
    """The student's probability there is all that is left."""
    t = randn(6, C, seed=31).float()
    s = t + 0.05 * randn(6, C, seed=32).float()
    s[:, 0] += 0.3
    s[:, 2] = torch.tensor([-3.0, -5.0, -8.0, -12.0, -20.0, -60.0])
    t[:, 2] = -math.inf
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    d = torch.where(p_t > 0, log_t - log_s, 0.0)
    rows = torch.where(p_t > 0, p_t * (torch.expm1(-d) + d), p_s).sum(-1)
    grad = torch.where(p_t > 0, p_t * torch.expm1(-d), p_s)
    for teacher_too in (False, True):
        x, y = on.leaf(s), on.leaf(t).requires_grad_(teacher_too)
        loss = on.kd_loss(x, y, reduction="none")
        loss.sum().backward()
        assert_loss(loss, rows, torch.float32, kd=True)
        assert_kd_grad(x.grad, grad, torch.float32, largest=p_t.max().item())


def test_masked_classes_of_a_student_have_no_gradient(on):
    """Nor where the teacher has too little mass in one of them for float32."""
    s = torch.tensor([[0.0, 0.1, -math.inf, -math.inf]])
    t = torch.tensor([[0.0, 0.0, -300.0, -5.0]])
    x = on.leaf(s)
    loss = on.kd_loss(x, t.to(on.device))
    loss.backward()
    assert loss == math.inf
    p_s, p_t = s.double().softmax(-1), t.double().softmax(-1)
    assert_kd_grad(x.grad[:, :2], (p_s - p_t)[:, :2], torch.float32)
    assert (x.grad[:, 2:] == 0).all()


@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("C", [12, 300])
def test_a_finite_mask_beside_an_infinite_one_has_no_mass(on, C, teacher_too):
    s, t = randn(5, C, seed=37).float(), randn(5, C, seed=38).float()
    s[:, 7], t[:, 7] = -math.inf, -1e4
    x, y = on.leaf(s), on.leaf(t).requires_grad_(teacher_too)
    loss = on.kd_loss(x, y, reduction="none")
    loss.sum().backward()
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    assert_loss(loss, torch.where(p_t > 0, p_t * (log_t - log_s), 0.0).sum(-1), s.dtype, kd=True)
    assert_kd_grad(x.grad, p_s - p_t, s.dtype)
    assert not teacher_too or y.grad.isfinite().all()


def test_a_class_masked_in_a_teacher_that_is_nearly_equal(on):
    """It keeps the row from being near; what the others have is small all the same."""
    t = 0.3 * randn(8, 17, seed=35).float()
    s = t + 1e-4 * randn(8, 17, seed=36).float()
    s[:, 2] = torch.linspace(-20, -80, 8)
    t[:, 2] = -math.inf
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    d = torch.where(p_t > 0, log_t - log_s, 0.0)
    rows = torch.where(p_t > 0, p_t * (torch.expm1(-d) + d), p_s).sum(-1)
    loss = on.kd_loss(s.to(on.device), t.to(on.device), reduction="none")
    if on.backend == "triton":  # the ratio of the normalisers is right to 1e-7
        torch.testing.assert_close(loss.double().cpu(), rows, rtol=1e-3, atol=1e-14)
    else:
        assert_loss(loss, rows, torch.float32, kd=True)


@pytest.mark.parametrize("C", [40, 1000])
@pytest.mark.parametrize("masked", [0, 7])
def test_a_gradient_beside_a_class_that_only_the_student_masks(on, C, masked):
    """What the other classes have is small against their probabilities."""
    t = torch.zeros(3, C)
    t[2] = 0.1 * randn(C, seed=33).float()
    s = t + 1e-4 * randn(3, C, seed=34).float()
    s[1:, masked] = -math.inf
    s[0] = t[0]
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    expected = log_t.exp() * torch.expm1(log_s - log_t)
    expected[1:, masked] = 0
    x = on.leaf(s)
    loss = on.kd_loss(x, t.to(on.device), reduction="none")
    loss.sum().backward()
    assert loss.tolist() == [0, math.inf, math.inf]
    on_gpu = on.backend in ("triton", "cuda_emulated", "cuda")
    for row, expected_row in zip(x.grad, expected, strict=True):
        assert_kd_grad(row, expected_row, torch.float32, largest=1 / C if on_gpu else None)


@pytest.mark.parametrize("constant", [0.3, 1e10, 1e30])
def test_one_class(on, constant):
    x = on.leaf(torch.full((3, 1), constant))
    loss = on.kd_loss(x, torch.tensor([[0.1], [-7.7e9], [1e-3]], device=on.device))
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_jsd_of_masked_classes_is_finite(on, where):
    s, t = randn(5, 12, seed=18), randn(5, 12, seed=19)
    (s if where == "student" else t)[:, 2] = -math.inf
    p, q = s.softmax(-1), t.softmax(-1)
    m = (p + q) / 2
    rows = 0.5 * (torch.xlogy(q, q / m) + torch.xlogy(p, p / m)).sum(-1)
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, divergence="jsd", reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.cpu(), rows, rtol=1e-11, atol=0)
    masked = x if where == "student" else y
    assert (masked.grad[:, 2] == 0).all()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


def test_masked_classes_in_ctc(on):
    """A class that the target does not use, masked: as if it were not there."""
    p = problem(C=8, seed=20)
    wide = torch.cat([p.logits, torch.full((*p.logits.shape[:2], 2), -math.inf)], -1)
    for dtype in (torch.float32, torch.float64):
        loss, grad = run(on, wide.to(dtype), *p.rest, reduction="sum")
        expected, expected_grad = ctc_oracle(p._replace(logits=p.logits.to(dtype)))
        assert_loss(loss, expected, dtype)
        assert_ctc_grad(grad[:, :, :8], expected_grad, dtype)
        assert (grad[:, :, 8:] == 0).all()


# ------------------------------------------------------------------------------------------- finite


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_utterance(on, poison):
    p = problem(seed=21, full=True)
    logits = p.logits.float()
    expected, expected_grad = run(on, logits, *p.rest, reduction="none")
    logits[4, 1, 3] = poison
    loss, grad = run(on, logits, *p.rest, reduction="none")
    assert loss[1].isnan()
    assert grad[:, 1].isnan().any()
    assert torch.equal(loss[[0, 2]], expected[[0, 2]])
    assert torch.equal(grad[:, [0, 2]], expected_grad[:, [0, 2]])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_stays_in_its_row(on, poison, divergence, where):
    s, t = randn(4, 9, seed=22, dtype=torch.float32), randn(4, 9, seed=23, dtype=torch.float32)
    (s if where == "student" else t)[2, 5] = poison
    x = on.leaf(s)
    loss = on.kd_loss(x, t.to(on.device), divergence=divergence, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False]
    assert x.grad.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_a_row_without_a_class_left(on, divergence, where):
    s, t = randn(4, 9, seed=22, dtype=torch.float32), randn(4, 9, seed=23, dtype=torch.float32)
    for logits in (s, t) if where == "both" else (s if where == "student" else t,):
        logits[2] = -math.inf
    x, y = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(x, y, divergence=divergence, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False]
    for grad in (x.grad, y.grad):
        assert grad.isnan().all(-1).tolist() == [False, False, True, False]
        assert not grad[[0, 1, 3]].isnan().any()


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_a_float32_loss(on, dtype):
    T = 40 if on.slow else 200
    p = problem(T=T, N=2, C=10, S=T // 5, seed=24)
    logits = p.logits.to(dtype)
    loss, grad = run(on, logits, *p.rest, reduction="sum")
    expected, _ = run(on, logits.float(), *p.rest, reduction="sum")
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    s, t = logits[:, 0], randn(T, 10, seed=25).to(dtype)
    loss = on.kd_loss(s.to(on.device), t.to(on.device))
    expected = on.kd_loss(s.float().to(on.device), t.float().to(on.device))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_any_size_in_a_mean_of_halves(on, size, dtype):
    """A mean does not depend on it; a gradient before the division would."""
    s, t = randn(40, 9, seed=33).half(), randn(40, 9, seed=34).half()
    weight = torch.linspace(0, size, 40).clamp(max=6e4).to(dtype)
    expected, grad, _ = kd_oracle(s, t, weight=weight)
    x = on.leaf(s)
    loss = on.kd_loss(x, t.to(on.device), weight=weight.to(on.device))
    (256 * loss).backward()
    assert_loss(loss, expected, torch.float16, kd=True)
    assert_kd_grad(x.grad, 256 * grad, torch.float16, 2)


def kd_grad(s, t, **options):
    s = s.clone().requires_grad_()
    kd.kd_loss(s, t, backend="cpp", **options).backward()
    return s.grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_below_the_normal_numbers_are_zero(dtype, divergence):
    """They would slow Intel's processors many times; torch's own arithmetic keeps them."""
    tiny = torch.finfo(dtype).tiny
    s = math.log(tiny) * torch.linspace(0, 1, 64, dtype=dtype).expand(50, 64)
    t = 0.99 * s
    weight = torch.full((50,), 1e-3, dtype=dtype)
    grad = kd_grad(s, t, weight=weight, divergence=divergence, reduction="sum")
    assert (grad.abs() > 0).any()
    assert ((grad == 0) | (grad.abs() >= tiny)).all()
    assert (torch.full((1 << 20,), tiny, dtype=dtype) * 0.5 > 0).all()  # of every thread


def test_arguments_below_the_normal_numbers_are_read():
    """A subnormal half is, whatever torch is told."""
    s, t = 3e-6 * randn(40, 9, seed=28), 3e-6 * randn(40, 9, seed=29)
    s, t = s.to(torch.float16), t.to(torch.float16)
    p = problem(C=9, seed=30)
    expected = kd_grad(s, t), *run(Place("cpu", "cpp"), p.logits.float(), *p.rest)
    torch.set_flush_denormal(True)
    try:
        found = kd_grad(s, t), *run(Place("cpu", "cpp"), p.logits.float(), *p.rest)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert (expected[0] != 0).any()


# ---------------------------------------------------------- values that the host does not look at


def unchecked(on):
    """The backend's own functions, where it must bear any value: what runs on a GPU."""
    if on.backend == "cpp":
        pytest.skip("runs on CPUs alone, where every value is checked")
    return backends.load(on.backend)


def with_bad_value(p, what, value):
    """Lengths and targets of a problem, one of them wrong, in utterance 1."""
    rest = dict(zip(Problem._fields[1:], (x.clone() for x in p.rest), strict=True))
    rest[what][(1, 2) if what == "targets" else 1] = value
    return rest.values()


BAD_VALUES = pytest.mark.parametrize(
    ("what", "value"),
    [
        ("input_lengths", 99),
        ("input_lengths", -1),
        ("target_lengths", 99),
        ("target_lengths", -3),
        ("targets", 12),
        ("targets", -1),
        ("targets", 0),
    ],
)


@BAD_VALUES
def test_bad_value_past_the_checks_is_nan(on, what, value):
    """What a GPU must do, where values are not read on the host: here without the checks."""
    backend = unchecked(on)
    p = problem(C=12, seed=26, full=True).to(on.device, torch.float64)
    rest = with_bad_value(p, what, value)
    loss, grad = backend.ctc_loss_forward(p.logits, *rest, 0, "none", False, True)
    expected, expected_grad = backend.ctc_loss_forward(p.logits, *p.rest, 0, "none", False, True)
    assert loss[1].isnan()
    assert torch.equal(loss[[0, 2]], expected[[0, 2]])
    assert torch.equal(grad[:, [0, 2]], expected_grad[:, [0, 2]])
    paths, scores = backend.ctc_align(p.logits, *rest, 0)
    assert scores[1].isnan()
    assert (paths[1] == -1).all()
    occupancy = backend.ctc_posteriors(p.logits, *rest, 0)
    expected = backend.ctc_posteriors(p.logits, *p.rest, 0)
    some_frames = (what, value) != ("input_lengths", -1)
    assert occupancy[:, 1].isnan().any() == some_frames
    assert (occupancy[:, 1].isnan() | (occupancy[:, 1] == 0)).all()
    assert torch.equal(occupancy[:, [0, 2]], expected[:, [0, 2]])


@BAD_VALUES
def test_bad_value_past_the_checks_is_nan_with_a_teacher(on, what, value):
    """The same of ctc_kd_loss: the sum is nan, and so is the utterance's own term."""
    backend = unchecked(on)
    p = problem(T=20, C=12, seed=27, full=True).to(on.device, torch.float64)
    teacher = p.logits.roll(1, 0)
    tail = (None, None, 0, "none", False, 0.5, 0.5, 2.0, 2.0, "forward_kl", 0.5, True, True, True)
    call = backend.ctc_kd_loss_forward
    expected = call(p.logits, teacher, *p.rest, *tail)
    found = call(p.logits, teacher, *with_bad_value(p, what, value), *tail)
    loss, ctc, _ = found[:3]
    assert loss[1].isnan()
    assert ctc[1].isnan()
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    for a, b in zip(found[3:], expected[3:], strict=True):
        assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])
