"""The modules, and the drop-in for torch.nn.functional.ctc_loss."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import problem, randn

import kdkernels as kd

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss")
pytestmark = pytest.mark.large  # what surrounds every backend alike
ORIGINAL = F.ctc_loss


@pytest.fixture(autouse=True)
def torch_is_given_back():
    assert F.ctc_loss is ORIGINAL
    yield
    assert F.ctc_loss is ORIGINAL


def test_kd_module(on):
    s, t = randn(4, 6, seed=1).to(on.device), randn(4, 6, seed=2).to(on.device)
    weight = torch.rand(4, generator=torch.Generator().manual_seed(1)).to(on.device)
    options = {
        "temperature": 2.0,
        "divergence": "jsd",
        "beta": 0.3,
        "reduction": "sum",
        "rescale": False,
    }
    module = kd.KDLoss(**options, backend=on.backend)
    assert torch.equal(module(s, t, weight), on.kd_loss(s, t, weight=weight, **options))
    assert torch.equal(kd.KDLoss()(s, t), kd.kd_loss(s, t))
    assert "temperature=2.0" in repr(module)


def test_ctc_module(on):
    p = problem(seed=3)
    x = p.logits.to(on.device)
    options = {"blank": 0, "reduction": "sum", "zero_infinity": True}
    module = kd.CTCLoss(**options, backend=on.backend)
    assert torch.equal(module(x, *p.rest), on.ctc_loss(x, *p.rest, **options))
    first = kd.CTCLoss(batch_first=True, backend=on.backend)
    assert torch.equal(first(x.transpose(0, 1), *p.rest), on.ctc_loss(x, *p.rest))


def test_ctc_kd_module(on):
    p = problem(seed=4)
    x, y = p.logits.to(on.device), randn(*p.logits.shape, seed=5).to(on.device)
    options = {"kd_weight": 0.3, "ctc_weight": 2.0, "temperature": 1.5, "divergence": "reverse_kl"}
    labelled = torch.tensor([True, True, False])
    module = kd.CTCKDLoss(**options, backend=on.backend)
    terms = module(x, y, *p.rest, labelled=labelled)
    expected = on.ctc_kd_loss(x, y, *p.rest, labelled=labelled, **options)
    assert isinstance(terms, kd.CTCKDTerms)
    for a, b in zip(terms, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", [kd.KDLoss(temperature=3.0), kd.CTCLoss(2), kd.CTCKDLoss()])
def test_modules_are_copied_and_pickled(module):
    assert repr(copy.deepcopy(module)) == repr(module)
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)
    assert not module.state_dict()


# -------------------------------------------------------------------------------------------- patch


def torch_losses(p, device, **options):
    """torch.nn.CTCLoss's and F.ctc_loss's loss and gradient, whatever stands behind them."""
    results = []
    for function in (torch.nn.CTCLoss(**options), lambda *a: F.ctc_loss(*a, **options)):
        x = p.logits.log_softmax(-1).to(device).requires_grad_()
        loss = function(x, *p.rest)
        results += [loss.detach().cpu(), torch.autograd.grad(loss.sum(), x)[0].cpu()]
    return results


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_patch_gives_torch_s_numbers(on, reduction, dtype):
    p = problem(seed=6)
    p = p._replace(logits=p.logits.to(dtype))
    options = {"reduction": reduction, "zero_infinity": True}
    expected = torch_losses(p, "cpu", **options)
    with kd.patch(backend=on.backend):
        assert F.ctc_loss is not ORIGINAL
        x = p.logits.log_softmax(-1).to(on.device).requires_grad_()
        assert "Fused" in type(F.ctc_loss(x, *p.rest, reduction="sum").grad_fn).__name__
        results = torch_losses(p, on.device, **options)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_patch_takes_two_dims(on, reduction, kind):
    p = problem(N=1, seed=7)
    log_probs = p.logits[:, 0].log_softmax(-1)
    T, S = log_probs.shape[0], p.targets.shape[1]
    lengths = (torch.tensor(T), torch.tensor(S)) if kind == "tensor" else ((T,), (S,))
    expected = F.ctc_loss(log_probs, p.targets[0], *lengths, reduction=reduction)
    with kd.patch(backend=on.backend):
        loss = F.ctc_loss(log_probs.to(on.device), p.targets[0], *lengths, reduction=reduction)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=0)


def test_patch_takes_what_torch_takes(on):
    """By keyword, by position, concatenated targets, lengths as tuples and lists."""
    p = problem(seed=8)
    log_probs = p.logits.log_softmax(-1)
    rows = zip(p.targets, p.target_lengths, strict=True)
    concatenated = torch.cat([row[:n] for row, n in rows])
    sizes = (tuple(p.input_lengths.tolist()), tuple(p.target_lengths.tolist()))
    calls = [
        lambda x: F.ctc_loss(x, concatenated, *p.rest[1:], 0, "sum", True),
        lambda x: F.ctc_loss(x, p.targets, *sizes),
        lambda x: F.ctc_loss(
            log_probs=x,
            targets=p.targets.int(),
            input_lengths=p.input_lengths.int(),
            target_lengths=p.target_lengths.int(),
            blank=0,
            reduction="none",
            zero_infinity=False,
        ),
    ]
    for call in calls:
        expected = call(log_probs)
        with kd.patch(backend=on.backend):
            torch.testing.assert_close(
                call(log_probs.to(on.device)).cpu(), expected, rtol=1e-6, atol=0
            )


def test_patch_as_a_function():
    handle = kd.patch()
    try:
        assert F.ctc_loss is not ORIGINAL
    finally:
        handle.restore()
    assert F.ctc_loss is ORIGINAL
    handle.restore()
    assert F.ctc_loss is ORIGINAL


def test_patch_is_undone_by_an_exception():
    with pytest.raises(KeyError), kd.patch():
        raise KeyError
    assert F.ctc_loss is ORIGINAL


def test_patches_nest():
    with kd.patch():
        outer = F.ctc_loss
        with kd.patch(backend="reference"):
            assert F.ctc_loss is not outer
        assert F.ctc_loss is outer


def test_patches_are_undone_in_any_order():
    first, second = kd.patch(), kd.patch(backend="reference")
    inner = F.ctc_loss
    first.restore()
    assert F.ctc_loss is inner
    second.restore()
    assert F.ctc_loss is ORIGINAL


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"patch: expected `backend` in .*, got 'no'"):
        kd.patch(backend="no")
