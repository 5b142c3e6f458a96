"""torch.compile: one graph, dynamic shapes, the checks of torch.library, autocast."""

import pytest
import torch
from helpers import problem, randn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._pytree import tree_map

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss", "ctc_posteriors", "ctc_align")
pytestmark = pytest.mark.large  # what surrounds every backend alike


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cases(on, T=20, N=3, C=9, S=4, dtype=torch.float32, seed=1):
    """{operator: (leaves, function of the leaves)}"""
    p = problem(T, N, C, S, seed=seed)
    x = on.leaf(p.logits.to(dtype))
    y = on.leaf(randn(*p.logits.shape, seed=seed + 1).to(dtype))
    rest = [z.to(on.device) for z in p.rest]
    labelled = torch.arange(N, device=on.device) > 0
    weight = torch.rand(T, N, generator=torch.Generator().manual_seed(3)).to(on.device)

    def kd(x, y, *_):
        return on.kd_loss(x * 2, y, temperature=2.0, divergence="jsd").sum()

    def ctc(x, y, *rest):
        return on.ctc_loss(x * 2, *rest)

    def both(x, y, *rest):
        options = (
            {"labelled": labelled, "frame_weight": weight} if x.shape == p.logits.shape else {}
        )
        loss, ctc, kd = on.ctc_kd_loss(x * 2, y, *rest, temperature=2.0, **options)
        return loss + ctc + kd

    return (x, y, *rest), {"kd_loss": kd, "ctc_loss": ctc, "ctc_kd_loss": both}


def gradients(function, arguments):
    x, y, *rest = arguments
    value = function(x, y, *rest)
    grads = torch.autograd.grad(value, (x, y), allow_unused=True)
    return value.detach(), *grads


def assert_same(a, b, rtol=1e-6):
    for one, two in zip(a, b, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("op", ["kd_loss", "ctc_loss", "ctc_kd_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_graph(on, op, dtype):
    arguments, functions = cases(on, dtype=dtype)
    compiled = torch.compile(functions[op], fullgraph=True, backend="aot_eager")
    expected = gradients(functions[op], arguments)
    assert_same(gradients(compiled, arguments), expected, 1e-6 if dtype == torch.float32 else 2e-3)


# torch's own warning, from the modules that inductor imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_inductor(on):
    arguments, functions = cases(on)
    compiled = torch.compile(functions["ctc_kd_loss"], fullgraph=True)
    assert_same(gradients(compiled, arguments), gradients(functions["ctc_kd_loss"], arguments))


@pytest.mark.parametrize("op", ["kd_loss", "ctc_loss", "ctc_kd_loss"])
def test_dynamic_shapes(on, op):
    _, functions = cases(on)
    compiled = torch.compile(functions[op], fullgraph=True, dynamic=True, backend="aot_eager")
    stance = "default"
    for seed, (T, N, C, S) in enumerate([(24, 4, 11, 5), (31, 2, 7, 3), (18, 5, 30, 4)]):
        arguments, _ = cases(on, T, N, C, S, seed=seed)
        with torch.compiler.set_stance(stance):
            result = gradients(compiled, arguments)
        assert_same(result, gradients(functions[op], arguments))
        stance = "fail_on_recompile"


@pytest.mark.parametrize("op", ["kd_loss", "ctc_loss", "ctc_kd_loss"])
def test_dynamic_shapes_of_halves(on, op):
    """Their means are scaled by the size of the batch, of which only the range is looked at."""
    _, functions = cases(on)
    compiled = torch.compile(functions[op], fullgraph=True, dynamic=True, backend="aot_eager")
    stance = "default"
    for seed, T in enumerate((24, 25, 30)):
        arguments, _ = cases(on, T, seed=seed, dtype=torch.float16)
        with torch.compiler.set_stance(stance):
            gradients(compiled, arguments)
        stance = "fail_on_recompile"


@pytest.mark.parametrize("kind", ["lists", "tuples", "numbers", "size", "blank"])
def test_numbers_of_a_batch_are_compiled_once(on, kind):
    """Lengths that are no tensors, and the blank, are inputs of the graph, not constants in it."""
    x = on.leaf(randn(20, 2, 9).float())
    targets = torch.tensor([[7, 8], [8, 7]]).to(on.device)

    def loss(x, m, n, blank):
        if kind == "numbers":
            return on.ctc_loss(x[:, 0], targets[0], m, n)
        if kind == "size":
            return on.ctc_loss(x[:m], targets, [x[:m].shape[0]] * 2, [n, n])
        if kind == "blank":
            return on.ctc_loss(x, targets, [20, 20], [2, 2], blank=blank)
        pair = list if kind == "lists" else tuple
        return on.ctc_loss(x, targets, pair([m, m - 1]), pair([n, n]))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    stance = "default"
    for m, n, blank in ((20, 2, 3), (19, 2, 4), (17, 2, 2), (9, 2, 5)):
        with torch.compiler.set_stance(stance):
            value = compiled(x, m, n, blank)
        torch.testing.assert_close(value, loss(x, m, n, blank))
        stance = "fail_on_recompile"


def test_fake_tensors(on):
    """They have no memory: the operator's fake kernel answers."""
    (x, y, *rest), _ = cases(on)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        s, t = (mode.from_tensor(v.detach()).requires_grad_() for v in (x, y))
        for loss in (
            on.kd_loss(s, t),
            on.ctc_loss(s, *rest),
            on.ctc_kd_loss(s, t, *rest).loss,
        ):
            assert isinstance(loss, FakeTensor)
            (grad,) = torch.autograd.grad(loss, s)
            assert (grad.shape, grad.stride()) == (x.shape, x.stride())
        paths, scores = on.ctc_align(s, *rest)
        assert paths.shape == (x.shape[1], x.shape[0])
        assert scores.shape == (x.shape[1],)
        assert on.ctc_posteriors(s, *rest).shape == x.shape


class Stand(torch.Tensor):
    """A tensor that stands for another and has no memory of its own, as DTensor does."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda a: a.x if isinstance(a, cls) else a, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "which", ["targets", "input_lengths", "target_lengths", "labelled", "weight"]
)
def test_tensors_without_memory_beside_logits(on, which):
    (x, y, *rest), _ = cases(on)
    keys = ("targets", "input_lengths", "target_lengths", "labelled", "weight")
    labelled, weight = torch.arange(x.shape[1]) > 0, torch.rand(x.shape[:2])
    tensors = (*rest, labelled.to(on.device), weight.to(on.device))
    tensors = dict(zip(keys, tensors, strict=True))

    def results(targets, input_lengths, target_lengths, labelled, weight):
        rest = targets, input_lengths, target_lengths
        loss = on.ctc_kd_loss(x, y, *rest, labelled=labelled, frame_weight=weight).loss
        losses = [on.kd_loss(x, y, weight=weight), on.ctc_loss(x, *rest), loss]
        grads = [torch.autograd.grad(v, (x, y), allow_unused=True) for v in losses]
        return [*losses, *sum(grads, ()), *on.ctc_align(x, *rest), on.ctc_posteriors(x, *rest)]

    assert_same(results(**(tensors | {which: Stand(tensors[which])})), results(**tensors))


def test_functionalize(on):
    (x, y, *rest), _ = cases(on)

    def results(s, t):
        loss = on.ctc_kd_loss(s, t, *rest).loss
        return on.kd_loss(s, t), on.ctc_loss(s, *rest), loss, *on.ctc_align(s, *rest)

    x, y = x.detach(), y.detach()
    assert_same(torch.func.functionalize(results)(x, y), results(x, y))


def test_make_fx_sees_one_operator(on):
    (x, y, *_), _ = cases(on)
    graph = make_fx(lambda s: on.kd_loss(s, y.detach()))(x.detach()).graph
    assert torch.ops.kdkernels.kd_loss.default in [node.target for node in graph.nodes]


@pytest.mark.parametrize("layout", ["batch_first", "one", "strided"])
def test_layouts(on, layout):
    (x, _, *rest), _ = cases(on)

    def function(x, *rest):
        if layout == "batch_first":
            return on.ctc_loss(x.transpose(0, 1).contiguous() * 1, *rest, batch_first=True)
        if layout == "one":
            return on.ctc_loss(x[:, 0] * 1, rest[0][0], rest[1][0], rest[2][0])
        return on.ctc_loss(x[::2, :, :], rest[0], rest[1] // 2, rest[2] // 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, expected = compiled(x, *rest), function(x, *rest)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (value, expected)))


def test_alignment(on):
    (x, _, *rest), _ = cases(on)

    def function(x, *rest):
        gamma = on.ctc_posteriors(x * 2, *rest)
        paths, scores = on.ctc_align(x * 2, *rest)
        return gamma * 1, paths + 0, scores * 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, *rest), function(x, *rest))


@pytest.mark.parametrize("which", ["lengths", "labels"])
def test_values_are_checked(on, which):
    (x, _, targets, input_lengths, target_lengths), _ = cases(on)
    targets, input_lengths = targets.clone().cpu(), input_lengths.clone().cpu()
    if which == "lengths":
        input_lengths[1] = 99
    else:
        targets[0, 0] = 9
    compiled = torch.compile(on.ctc_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"ctc_loss: expected `(input_lengths|targets)` in"):
        compiled(x, targets, input_lengths, target_lengths.cpu())


def test_no_grad(on):
    arguments, functions = cases(on)
    compiled = torch.compile(functions["ctc_kd_loss"], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        value = compiled(*arguments)
    assert not value.requires_grad
    torch.testing.assert_close(value, functions["ctc_kd_loss"](*arguments).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(on, dtype, reduction):
    (x, y, *rest), _ = cases(on, T=9, N=2, C=5, S=2, dtype=dtype)
    ops, backend = torch.ops.kdkernels, on.backend
    kd = (2.0, 1.5, "jsd", 0.3)
    weight = torch.ones(9, 2, device=on.device)
    opcheck(ops.kd_loss.default, (x, y, weight, *kd, reduction, True, True, True, backend))
    opcheck(ops.kd_loss.default, (x, y.detach(), None, *kd, reduction, False, True, False, backend))
    opcheck(ops.ctc_loss.default, (x, *rest, 0, reduction, False, True, backend))
    labelled = torch.tensor([True, False], device=on.device)
    tail = (0, reduction, True, 0.4, 0.6, *kd, True)
    opcheck(ops.ctc_kd_loss.default, (x, y, *rest, labelled, weight, *tail, True, True, backend))
    opcheck(
        ops.ctc_kd_loss.default,
        (x.detach(), y, *rest, None, None, *tail, False, True, backend),
    )
    opcheck(ops.ctc_posteriors.default, (x.detach(), *rest, 0, backend))
    opcheck(ops.ctc_align.default, (x.detach(), *rest, 0, backend))


def test_opcheck_of_other_strides(on):
    (x, y, *rest), _ = cases(on, T=9, N=2, C=5, S=2)
    x = on.leaf(x.detach().transpose(0, 1).contiguous().transpose(0, 1))
    ops = torch.ops.kdkernels
    opcheck(ops.ctc_loss.default, (x, *rest, 0, "sum", False, True, on.backend))
    wide = torch.cat([y.detach()] * 2, -1)[..., :5].requires_grad_()
    tail = (None, 1.0, 1.0, "forward_kl", 0.5, "sum", True, True, True, on.backend)
    opcheck(ops.kd_loss.default, (x, wide, *tail))


@pytest.mark.parametrize("op", ["kd_loss", "ctc_loss", "ctc_kd_loss"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(on, op, compiled):
    """Half-precision logits of a layer under autocast are read as they are."""
    (x, y, *rest), functions = cases(on)
    weight = randn(9, 9, seed=4).float().to(on.device).requires_grad_()

    def step(x, y, *rest):
        with torch.autocast(on.device, dtype=torch.bfloat16):
            logits = x @ weight
            assert logits.dtype == torch.bfloat16
            return functions[op](logits, y, *rest)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    value = run(x, y, *rest)
    assert value.dtype == torch.float32
    (grad,) = torch.autograd.grad(value, weight)
    logits = (x.bfloat16() @ weight.bfloat16()).detach()
    expected = functions[op](logits, y, *rest)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=0)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()
    assert (grad != 0).any()


def test_second_derivative_of_the_operator_is_an_error(on):
    (x, _, *rest), _ = cases(on)
    loss, _ = torch.ops.kdkernels.ctc_loss(x, *rest, 0, "sum", False, True, on.backend)
    with pytest.raises(RuntimeError, match=r"ctc_loss: .*second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
