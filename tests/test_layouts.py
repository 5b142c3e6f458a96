"""Memory: layouts that a gradient cannot share, padding that outgrows what it pads, devices."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_ctc_grad, assert_kd_grad, assert_loss

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss")

SIZES = [  # T, S of the padded targets, S of the utterances, C
    (458, 460, 440, 20),
    (700, 207, 191, 20),
    (400, 127, 111, 40),
    (476, 479, 475, 8),
    (620, 127, 119, 5),
]
SIZES = [*(pytest.param(size, marks=pytest.mark.large) for size in SIZES), (60, 47, 39, 5)]


def truth(x, targets, input_lengths, target_lengths):
    x = x.detach().double().requires_grad_()
    losses = F.ctc_loss(x.log_softmax(-1), targets, input_lengths, target_lengths, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_targets_shorter_than_their_padding(on, size, dtype):
    """The recursion of a short target may keep more rows than that of the padded one."""
    T, padded, S, C = size
    g = torch.Generator().manual_seed(T)
    x = torch.randn(T, 3, C, generator=g).to(dtype)
    targets = torch.randint(1, C, (3, padded), generator=g)
    targets[:, 1:] += (targets[:, 1:] == targets[:, :-1]).long()
    targets = targets.remainder(C).clamp(min=1)
    lengths = torch.tensor([T, T, T]), torch.tensor([S, S - 1, min(S, T // 3)])
    expected, expected_grad = truth(x, targets, *lengths)
    leaf = on.leaf(x)
    losses = on.ctc_loss(leaf, targets, *lengths, reduction="none")
    finite = expected.isfinite()
    losses[finite.to(losses.device)].sum().backward()
    assert_loss(losses, expected, dtype)
    expected_grad[:, ~finite] = 0
    assert_ctc_grad(leaf.grad, expected_grad, dtype)


@pytest.mark.parametrize("layout", ["overlapping", "expanded rows", "expanded batch"])
def test_logits_that_overlap_themselves(on, layout):
    g = torch.Generator().manual_seed(1)
    base = {
        "overlapping": lambda: torch.randn(9, generator=g).unfold(0, 5, 1),
        "expanded rows": lambda: torch.randn(1, 6, generator=g).expand(4, 6),
        "expanded batch": lambda: torch.randn(5, 1, 7, generator=g).expand(5, 3, 7),
    }[layout]()
    other = torch.randn(base.shape, generator=g)
    x = base.detach().to(on.device).requires_grad_()
    on.kd_loss(x, other.to(on.device), reduction="sum").backward()
    expected = base.double().softmax(-1) - other.double().softmax(-1)
    assert_kd_grad(x.grad, expected, torch.float32)


def test_negated_view(on):
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    loss = on.kd_loss(torch._neg_view(s).to(on.device), t.to(on.device))
    assert_loss(loss, on.kd_loss((-s).to(on.device), t.to(on.device)), torch.float32, kd=True)


def test_negated_views_of_weights_targets_and_lengths(on):
    """A kernel reads memory as it is, and there every sign is the other one."""
    g = torch.Generator().manual_seed(4)
    s, t = torch.randn(2, 7, 3, 5, generator=g).to(on.device)
    weight = torch.rand(7, 3, generator=g).to(on.device)
    rest = torch.tensor([[1, 2], [3, 3], [4, 1]]), torch.tensor([7, 5, 6]), torch.tensor([2, 1, 2])

    def results(weight, *rest):
        return (
            on.kd_loss(s, t, weight=weight, reduction="none"),
            *on.ctc_kd_loss(s, t, *rest, frame_weight=weight, reduction="none"),
        )

    expected = results(weight, *rest)
    for a, b in zip(
        results(*(torch._neg_view(-x) for x in (weight, *rest))), expected, strict=True
    ):
        assert torch.equal(a, b)


def test_default_device_is_not_looked_at(on):
    x = torch.randn(5, 2, 4).to(on.device)
    targets, lengths = torch.tensor([[1], [2]]), ([5, 5], [1, 1])
    expected = on.kd_loss(x, x + 1), on.ctc_loss(x, targets, *lengths)
    with torch.device("meta"):
        got = on.kd_loss(x, x + 1), on.ctc_loss(x, targets, *lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_teacher_of_weight_zero_changes_nothing(on):
    x = on.leaf(torch.randn(6, 2, 5))
    args = torch.tensor([[1, 2], [3, 4]]), [6, 6], [2, 2]
    nothing = torch.full((6, 2, 5), math.nan, device=on.device)
    on.ctc_kd_loss(x, nothing, *args, kd_weight=0.0, ctc_weight=1.0).loss.backward()
    grad, x.grad = x.grad, None
    on.ctc_loss(x, *args).backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.large
def test_float16_gradient_of_a_single_frame_is_finite(on):
    """Few frames that count in a large batch: their share of the mean is large."""
    T, N, C = 512, 16, 6
    x = on.leaf(torch.randn(T, N, C).half())
    weight = torch.zeros(T, N, device=on.device)
    weight[3, 2] = 1
    on.ctc_kd_loss(
        x, (-x).detach(), torch.ones(N, 1, dtype=torch.long), [T] * N, [1] * N,
        frame_weight=weight, kd_weight=0.5,
    ).loss.backward()  # fmt: skip
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("gap", [1e3, 1e5, 4e6])
def test_probability_of_a_class_far_below_the_largest(on, gap):
    """Two frames whose only difference is one nat in a class that is out of sight."""
    x = torch.zeros(2, 1, 3)
    x[:, 0, 1] = torch.tensor([-gap, -gap - 1])
    args = torch.tensor([[1]]), [2], [1]
    expected, expected_grad = truth(x, torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1]))
    leaf = on.leaf(x)
    loss = on.ctc_loss(leaf, *args, reduction="none")
    loss.sum().backward()
    assert_loss(loss, expected, torch.float32)
    assert (leaf.grad.cpu() - expected_grad).abs().max() < 1e-3


def test_impossible_label_beside_an_enormous_logit(on):
    x = torch.randn(30, 1, 5)
    x[4] = 0
    x[4, 0, 2] = 1e30
    loss = on.ctc_loss(on.leaf(x), torch.tensor([[1]]), [30], [1], reduction="none")
    assert loss.item() > 1e6
