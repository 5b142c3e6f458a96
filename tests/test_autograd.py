"""What is between the gradient made in forward and the one that the user gets; and bits that must
not change."""

import pytest
import torch
from helpers import ctc_oracle, kd_oracle, problem, randn, strided
from tolerances import assert_ctc_grad, assert_kd_grad
from torch.autograd import forward_ad

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss")
EVERY_OP = pytest.mark.parametrize("op", OPS)
HALF = (torch.float16, torch.bfloat16)


def losses(on, op, dtype=torch.float32, seed=1, **options):
    """(leaves, function of the leaves giving the loss)"""
    p = problem(T=30, N=3, C=11, S=5, seed=seed)
    x, y = on.leaf(p.logits.to(dtype)), on.leaf(randn(*p.logits.shape, seed=seed + 50).to(dtype))
    if op == "kd_loss":
        return (x, y), lambda x, y: on.kd_loss(x, y, temperature=2.0, **options)
    if op == "ctc_loss":
        return (x,), lambda x: on.ctc_loss(x, *p.rest, **options)
    return (x, y), lambda x, y: on.ctc_kd_loss(x, y, *p.rest, **options).loss


@EVERY_OP
@pytest.mark.parametrize("upstream", [1.0, 0.3, -2.0, 0.0, 65536.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scaled_loss(on, op, upstream, reduction):
    leaves, loss = losses(on, op, torch.float64, reduction=reduction)
    plain = torch.autograd.grad(loss(*leaves), leaves)
    scaled = torch.autograd.grad(loss(*leaves) * upstream, leaves)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a * upstream, b, rtol=1e-14, atol=0)


@EVERY_OP
def test_gradient_of_each_loss(on, op):
    """reduction="none" with another factor for each loss, from a strided gradient."""
    leaves, loss = losses(on, op, torch.float64, reduction="none")
    value = loss(*leaves)
    factors = strided(randn(*value.shape, 2, seed=2).to(on.device), "contiguous")[..., 0]
    grads = torch.autograd.grad(value, leaves, factors)
    expected = [torch.zeros_like(x) for x in leaves]
    for index in torch.cartesian_prod(*map(torch.arange, value.shape)).reshape(-1, value.dim()):
        one = loss(*leaves)[tuple(index)] * factors[tuple(index)]
        for total, grad in zip(expected, torch.autograd.grad(one, leaves), strict=True):
            total += grad
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.large
@EVERY_OP
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scale", [65536.0, 1024.0])
def test_amp_scale_reaches_half_precision(on, op, dtype, scale):
    """A gradient of a mean is too small for float16: the loss scale must come before the
    rounding."""
    p = problem(T=300, N=4, C=40, S=20, seed=3, full=True)
    logits, teacher = p.logits.to(dtype), randn(*p.logits.shape, seed=4).to(dtype)
    x = on.leaf(logits)
    if op == "kd_loss":
        loss = on.kd_loss(x, teacher.to(on.device))
        _, expected, _ = kd_oracle(logits, teacher)
    elif op == "ctc_loss":
        loss = on.ctc_loss(x, *p.rest)
        _, expected = ctc_oracle(p._replace(logits=logits), "mean")
    else:
        loss = on.ctc_kd_loss(x, teacher.to(on.device), *p.rest).loss
        _, ctc = ctc_oracle(p._replace(logits=logits), "mean")
        expected = 0.5 * ctc + 0.5 * kd_oracle(logits, teacher)[1]
    (loss * scale).backward()
    assert x.grad.isfinite().all()
    assert_kd_grad(x.grad, expected * scale, dtype, 2, largest=10 * (expected * scale).abs().max())
    if dtype == torch.float16:
        expected = expected * scale
        lost = (x.grad.double().cpu() - expected).abs() > 0.01 * expected.abs() + 1e-5
        assert lost.double().mean() < 0.001


@EVERY_OP
def test_graph_kept_gives_the_same_gradient_again(on, op):
    leaves, loss = losses(on, op)
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(value, leaves, torch.full_like(value, 3.0), retain_graph=True)
    third = torch.autograd.grad(value, leaves)
    for a, b, c, d in zip(first, copies, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, d)
        torch.testing.assert_close(c, 3 * a, rtol=1e-6, atol=0)
        assert len({x.data_ptr() for x in (a, c, d)}) == 3


@EVERY_OP
def test_graph_not_kept_is_an_error(on, op):
    leaves, loss = losses(on, op)
    value = loss(*leaves)
    value.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


@EVERY_OP
def test_gradient_is_accumulated_and_inputs_are_left_alone(on, op):
    leaves, loss = losses(on, op)
    before = [x.detach().clone() for x in leaves]
    loss(*leaves).backward()
    once = [x.grad.clone() for x in leaves]
    (2 * loss(*leaves)).backward()
    for x, old, grad in zip(leaves, before, once, strict=True):
        assert torch.equal(x.detach(), old)
        torch.testing.assert_close(x.grad, 3 * grad, rtol=1e-6, atol=1e-12)


@EVERY_OP
def test_second_derivative_is_an_error(on, op):
    leaves, loss = losses(on, op)
    for factor in (1.0, 3.0):  # the factor itself needs no gradient: still an error
        grads = torch.autograd.grad(factor * loss(*leaves), leaves, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match=f"{op}: .*second derivative"):
                grad.square().sum().backward(retain_graph=True)
    plain = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True), plain, strict=True
    ):
        assert torch.equal(a, b)


@EVERY_OP
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_tracing_is_an_error(on, op):
    leaves, loss = losses(on, op)
    with pytest.raises(RuntimeError, match=f"{op}: cannot be traced by torch.jit"):
        torch.jit.trace(loss, leaves)


@EVERY_OP
def test_without_grad(on, op):
    leaves, loss = losses(on, op)
    expected = loss(*leaves)
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            value = loss(*leaves)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    detached = loss(*(x.detach() for x in leaves))
    assert not detached.requires_grad
    torch.testing.assert_close(detached, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["kd_loss", "ctc_kd_loss"])
def test_teacher_of_inference_mode(on, op):
    """torch.inference_mode is how teachers are run; autograd saves nothing that it made."""
    (x, y), loss = losses(on, op)
    expected = torch.autograd.grad(loss(x, y.detach()), x)
    with torch.inference_mode():
        teacher = y * 1
    value = loss(x, teacher)
    for _ in range(2):  # the second time it is read again
        assert torch.equal(*torch.autograd.grad(value, x, retain_graph=True), *expected)


@EVERY_OP
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, on entering
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_an_error(on, op, requires_grad):
    """Not a loss without a tangent."""
    leaves, loss = losses(on, op)
    with forward_ad.dual_level():
        x = leaves[0].detach().requires_grad_(requires_grad)
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode"):
            loss(dual, *leaves[1:])


def test_targets_and_lengths_of_inference_mode(on):
    p = problem(seed=18).to(on.device, torch.float32)
    x = on.leaf(p.logits)
    (expected,) = torch.autograd.grad(on.ctc_loss(x, *p.rest), x)
    with torch.inference_mode():
        rest = [y + 0 for y in p.rest]
    assert torch.equal(torch.autograd.grad(on.ctc_loss(x, *rest), x)[0], expected)


@pytest.mark.parametrize("op", ["kd_loss", "ctc_kd_loss"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_needs_a_gradient(on, op, which):
    leaves, loss = losses(on, op)
    both = torch.autograd.grad(loss(*leaves), leaves)
    arguments = [x if i == which else x.detach() for i, x in enumerate(leaves)]
    (one,) = torch.autograd.grad(loss(*arguments), leaves[which])
    assert torch.equal(one, both[which])
    (asked,) = torch.autograd.grad(loss(*leaves), leaves[which])
    assert torch.equal(asked, both[which])


@EVERY_OP
def test_through_a_network(on, op):
    """The gradient of the logits goes on; the logits may be a view."""
    leaves, loss = losses(on, op, torch.float64)
    weight = randn(11, 11, seed=5).to(on.device).requires_grad_()
    value = loss(leaves[0] @ weight, *leaves[1:])
    (grad,) = torch.autograd.grad(value, weight)
    logits = (leaves[0] @ weight).detach().requires_grad_()
    (inner,) = torch.autograd.grad(loss(logits, *leaves[1:]), logits)
    expected = torch.einsum("tni,tnj->ij", leaves[0], inner)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------- the same bits


def bits(on, op, **options):
    leaves, loss = losses(on, op, **options)
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


@EVERY_OP
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_twice(on, op, reduction, dtype):
    first = bits(on, op, reduction=reduction, dtype=dtype)
    for a, b in zip(first, bits(on, op, reduction=reduction, dtype=dtype), strict=True):
        assert torch.equal(a, b)


@pytest.mark.large
@pytest.mark.parametrize("shape", [(1, 90000), (3, 30000), (70000, 3), (257, 33)])
def test_threads_kd_loss(on, threads, shape):
    s, t = randn(*shape, seed=6).float(), randn(*shape, seed=7).float()
    weight = randn(shape[0], seed=8).abs().to(on.device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        x, y = on.leaf(s), on.leaf(t)
        loss = on.kd_loss(x, y, weight=weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("weighted", [0, 1, 300, 900])
def test_threads_share_rows_that_count(on, threads, weighted):
    """Whatever rows have a weight of 0: of padding, all, or all but one."""
    s, t = randn(900, 40, seed=6).float(), randn(900, 40, seed=7).float()
    s[weighted:] = torch.nan
    weight = (torch.arange(900) < weighted).float().to(on.device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        x = on.leaf(s)
        loss = on.kd_loss(x, t.to(on.device), weight=weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
        assert not results[-1][1][weighted:].any()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.large
@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("op", ["ctc_loss", "ctc_kd_loss"])
def test_threads_ctc(on, threads, op, N):
    p = problem(T=90, N=N, C=60, S=12, seed=9)
    teacher = randn(*p.logits.shape, seed=10).float().to(on.device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        x = on.leaf(p.logits.float())
        if op == "ctc_loss":
            loss = on.ctc_loss(x, *p.rest)
        else:
            loss = on.ctc_kd_loss(x, teacher, *p.rest).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("regime", ["normal", "blank_collapsed", "trained"])
def test_an_utterance_alone_and_in_a_batch(on, regime):
    p = problem(T=30 if on.slow else 60, N=4, C=13, S=9, regime=regime, seed=11)
    logits = p.logits.float()
    teacher = randn(*p.logits.shape, seed=12).float().to(on.device)
    x = on.leaf(logits)
    loss = on.ctc_loss(x, *p.rest, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    both = on.ctc_kd_loss(x, teacher, *p.rest, reduction="none")
    (both_grad,) = torch.autograd.grad(both.loss.sum(), x)
    for n in range(4):
        T, S = int(p.input_lengths[n]), int(p.target_lengths[n])
        y = on.leaf(logits[:T, n : n + 1])  # neither padding of frames nor of labels
        rest = (p.targets[n : n + 1, :S], [T], [S])
        alone = on.ctc_loss(y, *rest, reduction="none")
        assert torch.equal(alone, loss[n : n + 1])
        assert torch.equal(torch.autograd.grad(alone.sum(), y)[0], grad[:T, n : n + 1])
        terms = on.ctc_kd_loss(y, teacher[:T, n : n + 1], *rest, reduction="none")
        assert torch.equal(terms.loss, both.loss[n : n + 1])
        assert torch.equal(torch.autograd.grad(terms.loss.sum(), y)[0], both_grad[:T, n : n + 1])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("C", [20, 501])
def test_a_row_alone_and_in_a_batch(on, divergence, C):
    """Rows from near ones to far ones, which are computed in different ways."""
    t = randn(6, C, seed=13)
    s = (t + randn(6, C, seed=14) * torch.logspace(-3, 1, 6)[:, None]).float().to(on.device)
    t = t.float().to(on.device)
    x = on.leaf(s)
    loss = on.kd_loss(x, t, reduction="none", divergence=divergence)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    for n in range(6):
        y = on.leaf(s[n])
        alone = on.kd_loss(y, t[n], reduction="none", divergence=divergence)
        assert torch.equal(alone, loss[n])
        assert torch.equal(torch.autograd.grad(alone, y)[0], grad[n])


@EVERY_OP
@pytest.mark.parametrize("layout", ["padded", "transposed", "sliced", "classes_first"])
def test_strides_do_not_change_bits(on, op, layout):
    leaves, loss = losses(on, op)
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves)
    others = [on.leaf(strided(x.detach(), layout)) for x in leaves]
    value_too = loss(*others)
    assert torch.equal(value, value_too)
    for a, b in zip(grads, torch.autograd.grad(value_too, others), strict=True):
        assert torch.equal(a, b)


def test_float32_gradient_of_a_mean_of_many(on):
    """The factor of a reduction is applied before the one rounding."""
    s, t = randn(3000, 7, seed=15), randn(3000, 7, seed=16)
    x = on.leaf(s.float())
    on.kd_loss(x, t.float().to(on.device)).backward()
    assert_kd_grad(x.grad, kd_oracle(s.float(), t.float())[1], torch.float32)


def test_ctc_gradient_in_float64_from_float32_leaves(on):
    p = problem(seed=17)
    x = on.leaf(p.logits.float())
    on.ctc_loss(x.double(), *p.rest, reduction="sum").backward()
    assert x.grad.dtype == torch.float32
    assert_ctc_grad(x.grad, ctc_oracle(p._replace(logits=p.logits.float()))[1], torch.float32)
