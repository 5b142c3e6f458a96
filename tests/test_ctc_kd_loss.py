import hypothesis.strategies as st
import pytest
import torch
from helpers import LAYOUTS, REGIMES, ctc_oracle, kd_oracle, problem, randn, strided
from tolerances import DTYPES, assert_ctc_grad, assert_kd_grad, assert_loss

OPS = ("ctc_kd_loss",)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def large(*values):
    """Parameters that an interpreted backend does without: other tests show it the same."""
    return [pytest.param(value, marks=pytest.mark.large) for value in values]


def oracle(p, teacher, reduction="mean", kd_weight=0.5, ctc_weight=None, labelled=None, **options):
    """(loss, ctc, kd, student gradient, teacher gradient) by the definition of each term."""
    ctc_weight = 1 - kd_weight if ctc_weight is None else ctc_weight
    T, N, _ = p.logits.shape
    labelled = torch.ones(N, dtype=torch.bool) if labelled is None else labelled
    frame_weight = options.pop("frame_weight", None)
    weight = (torch.arange(T)[:, None] < p.input_lengths).double()
    if frame_weight is not None:
        weight = torch.where(weight > 0, frame_weight.double(), 0.0)

    if labelled.any():
        part = p._replace(logits=p.logits[:, labelled], targets=p.targets[labelled])
        part = part._replace(
            input_lengths=p.input_lengths[labelled], target_lengths=p.target_lengths[labelled]
        )
        ctc_labelled, grad_labelled = ctc_oracle(part, reduction)
    else:
        ctc_labelled = torch.zeros((0,) if reduction == "none" else (), dtype=torch.float64)
        grad_labelled = torch.zeros(T, 0, p.logits.shape[-1], dtype=torch.float64)
    grad_ctc = torch.zeros(p.logits.shape, dtype=torch.float64)
    grad_ctc[:, labelled] = grad_labelled
    ctc = ctc_labelled
    if reduction == "none":
        ctc = torch.zeros(N, dtype=torch.float64)
        ctc[labelled] = ctc_labelled

    how = "mean" if reduction == "mean" and weight.sum() > 0 else "sum"
    kd, grad_s, grad_t = kd_oracle(p.logits, teacher, weight=weight, reduction=how, **options)
    if reduction == "none":
        rows, *_ = kd_oracle(p.logits, teacher, weight=weight, reduction="none", **options)
        kd = rows.sum(0)
    return (
        ctc_weight * ctc + kd_weight * kd,
        ctc,
        kd,
        ctc_weight * grad_ctc + kd_weight * grad_s,
        kd_weight * grad_t,
    )


def check(on, p, teacher, dtype=torch.float32, teacher_dtype=None, **options):
    p = p._replace(logits=p.logits.to(dtype))
    teacher = teacher.to(teacher_dtype or dtype)
    expected = oracle(p, teacher, **options)
    x, y = on.leaf(p.logits), on.leaf(teacher)
    if options.get("frame_weight") is not None:
        options["frame_weight"] = options["frame_weight"].to(on.device)
    terms = on.ctc_kd_loss(x, y, *p.rest, **options)
    narrow = torch.float64 if x.dtype == y.dtype == torch.float64 else torch.float32
    assert_loss(terms.loss, expected[0], narrow)
    assert_loss(terms.ctc, expected[1], narrow)
    assert_loss(terms.kd, expected[2], narrow)
    assert not terms.ctc.requires_grad
    assert not terms.kd.requires_grad
    terms.loss.sum().backward()
    assert x.grad.dtype == x.dtype
    assert_ctc_grad(x.grad, expected[3], dtype if dtype.itemsize == 2 else narrow, 2)
    assert_kd_grad(y.grad, expected[4], y.dtype if y.dtype.itemsize == 2 else narrow, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", [*large("none", "sum"), "mean"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_definition(on, dtype, reduction, divergence):
    p = problem(T=25, N=4, C=15, seed=1)
    teacher = randn(25, 4, 15, seed=2, scale=2)
    options = {"temperature": 2.0, "teacher_temperature": 1.5, "kd_weight": 0.7, "beta": 0.3}
    check(on, p, teacher, dtype, reduction=reduction, divergence=divergence, **options)


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(on, regime):
    T, N, C, S = (50, 2, 20, 9) if on.slow else (700, 2, 32, 100)
    p = problem(T, N, C, S, regime, seed=3)
    check(on, p, p.logits.roll(1, 0) + randn(*p.logits.shape, seed=4), reduction="sum")


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_dtypes_may_differ(on, teacher_dtype):
    p = problem(seed=5)
    check(on, p, randn(*p.logits.shape, seed=6), torch.float32, teacher_dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("labelled", [[True, False, True], [False] * 3, *large([True] * 3)])
def test_labelled(on, reduction, labelled):
    p = problem(seed=7)
    teacher = randn(*p.logits.shape, seed=8)
    check(on, p, teacher, labelled=torch.tensor(labelled), reduction=reduction)


def test_labels_of_unlabelled_utterances_are_never_looked_at(on):
    p = problem(seed=9)
    teacher = randn(*p.logits.shape, seed=10).to(on.device)
    labelled = torch.tensor([True, False, True])
    junk = p.targets.clone()
    junk[1] = torch.tensor([-7, 0, 999, 0, -1, 5000])
    x, y = on.leaf(p.logits), on.leaf(p.logits)
    loss = on.ctc_kd_loss(x, teacher, *p.rest, labelled=labelled).loss
    other = on.ctc_kd_loss(y, teacher, junk, *p.rest[1:], labelled=labelled).loss
    assert torch.equal(loss, other)
    loss.backward()
    other.backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, *large(torch.float64)], ids=str)
def test_frame_weight(on, reduction, dtype):
    p = problem(seed=11)
    weight = torch.randint(0, 3, p.logits.shape[:2], generator=torch.Generator().manual_seed(1))
    teacher = randn(*p.logits.shape, seed=12)
    check(on, p, teacher, frame_weight=weight.to(dtype), reduction=reduction)


def test_frame_weights_that_add_up_to_zero(on):
    """A mean of 0 for the divergence, as of kd_loss, and no gradient."""
    p = problem(seed=3).to(on.device, torch.float32)
    teacher = randn(*p.logits.shape, seed=4).to(on.device, torch.float32)
    x = on.leaf(p.logits)
    weight = torch.zeros(p.logits.shape[:2], device=on.device)
    weight[0], weight[1] = 1, -1
    terms = on.ctc_kd_loss(x, teacher, *p.rest, frame_weight=weight, kd_weight=1.0)
    terms.loss.backward()
    assert terms.loss == terms.kd == 0
    assert not x.grad.any()


def test_frames_of_weight_zero_do_not_read_the_teacher(on):
    p = problem(seed=13, full=True)
    weight = torch.ones(p.logits.shape[:2])
    weight[3:9, 1] = 0
    teacher = randn(*p.logits.shape, seed=14)
    poisoned = teacher.clone()
    poisoned[3:9, 1] = torch.nan
    x, y = on.leaf(p.logits), on.leaf(p.logits)
    weight = weight.to(on.device)
    one = on.ctc_kd_loss(x, teacher.to(on.device), *p.rest, frame_weight=weight)
    two = on.ctc_kd_loss(y, poisoned.to(on.device), *p.rest, frame_weight=weight)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    one.loss.backward()
    two.loss.backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("kd_weight", "ctc_weight"),
    [
        *((kd, ctc) for kd in (0.0, 1.0, 0.25) for ctc in (None, 0.0)),
        (3.0, 0.0),
        *(pytest.param(kd, 2.0, marks=pytest.mark.large) for kd in (0.0, 1.0, 0.25, 3.0)),
    ],
)
def test_weights_of_the_terms(on, kd_weight, ctc_weight):
    p = problem(seed=15)
    teacher = randn(*p.logits.shape, seed=16)
    check(on, p, teacher, kd_weight=kd_weight, ctc_weight=ctc_weight)


def test_a_term_of_weight_zero_is_absent(on):
    p = problem(seed=17)
    teacher = randn(*p.logits.shape, seed=18).to(on.device)
    impossible = torch.ones_like(p.input_lengths)
    x = on.leaf(p.logits)
    terms = on.ctc_kd_loss(x, teacher, p.targets, impossible, p.target_lengths, kd_weight=1.0)
    assert terms.ctc.isinf()
    assert terms.loss == terms.kd
    terms.loss.backward()
    assert x.grad.isfinite().all()


def test_a_term_of_weight_zero_gives_the_teacher_no_gradient(on):
    """Not even NaN, which 0 times NaN is."""
    p = problem(seed=17)
    logits, y = p.logits.clone(), on.leaf(randn(*p.logits.shape, seed=18))
    logits[2, 0] = torch.nan
    terms = on.ctc_kd_loss(on.leaf(logits), y, *p.rest, kd_weight=0.0)
    assert terms.kd.isnan()
    terms.loss.backward()
    assert (y.grad == 0).all()


def test_impossible_target_keeps_the_gradient_of_kd(on):
    p = problem(seed=19)
    teacher = randn(*p.logits.shape, seed=20)
    lengths = p.input_lengths.clone()
    lengths[0] = 3
    for zero_infinity in (False, True):
        x = on.leaf(p.logits)
        rest = (p.targets, lengths, p.target_lengths)
        terms = on.ctc_kd_loss(
            x, teacher.to(on.device), *rest, reduction="none", zero_infinity=zero_infinity
        )
        assert terms.ctc[0] == (0 if zero_infinity else torch.inf)
        terms.loss[1:].sum().backward(retain_graph=True)
        assert (x.grad[:, 0] == 0).all()
        x.grad = None
        terms.loss.sum().backward()
        weight = (torch.arange(len(p.logits))[:, None] < lengths).double()
        _, grad, _ = kd_oracle(p.logits, teacher, weight=weight, reduction="sum")
        torch.testing.assert_close(x.grad[:, 0].cpu(), 0.5 * grad[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(on, layout):
    p = problem(seed=21)
    teacher = randn(*p.logits.shape, seed=22)
    expected = oracle(p, teacher)
    x = on.leaf(strided(p.logits.to(on.device), layout))
    y = on.leaf(strided(teacher.to(on.device), LAYOUTS[LAYOUTS.index(layout) - 1]))
    terms = on.ctc_kd_loss(x, y, *p.rest)
    terms.loss.backward()
    assert_loss(terms.loss, expected[0], torch.float64)
    assert_ctc_grad(x.grad, expected[3], torch.float64)
    assert_kd_grad(y.grad, expected[4], torch.float64)


def test_batch_first(on):
    p = problem(seed=23)
    teacher = randn(*p.logits.shape, seed=24).to(on.device)
    weight = torch.rand(p.logits.shape[:2], generator=torch.Generator().manual_seed(1))
    weight = weight.to(on.device)
    x, y = on.leaf(p.logits), on.leaf(p.logits.transpose(0, 1).contiguous())
    one = on.ctc_kd_loss(x, teacher, *p.rest, frame_weight=weight)
    two = on.ctc_kd_loss(
        y, teacher.transpose(0, 1), *p.rest, frame_weight=weight.t(), batch_first=True
    )
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    one.loss.backward()
    two.loss.backward()
    assert torch.equal(x.grad, y.grad.transpose(0, 1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_utterance_without_a_batch(on, reduction):
    p = problem(N=1, seed=25)
    teacher = randn(*p.logits.shape, seed=26)
    T, S = p.logits.shape[0], p.targets.shape[1]
    weight = torch.rand(T, 1, generator=torch.Generator().manual_seed(1))
    terms = on.ctc_kd_loss(
        p.logits[:, 0].to(on.device),
        teacher[:, 0].to(on.device),
        p.targets[0],
        T,
        S,
        reduction=reduction,
        frame_weight=weight[:, 0].to(on.device),
    )
    expected = oracle(p, teacher, reduction, frame_weight=weight)
    for a, b in zip(terms, expected, strict=False):
        assert a.shape == ()
        assert_loss(a, b.squeeze(), torch.float64)


def test_identical_logits_leave_ctc_alone(on):
    p = problem(seed=27)
    x = on.leaf(p.logits)
    terms = on.ctc_kd_loss(x, p.logits.to(on.device), *p.rest, reduction="sum")
    assert terms.kd == 0
    terms.loss.backward()
    _, grad = ctc_oracle(p)
    assert_ctc_grad(x.grad, 0.5 * grad, torch.float64)


@pytest.mark.parametrize("reduction", [*large("none", "sum"), "mean"])
def test_gradcheck(on, reduction):
    p = problem(T=6, N=2, C=4, S=2, seed=28)
    x, y = on.leaf(p.logits), on.leaf(randn(*p.logits.shape, seed=29))

    def loss(x, y):
        return on.ctc_kd_loss(x, y, *p.rest, reduction=reduction, temperature=1.5).loss

    assert on.gradcheck(loss, (x, y))


def test_any_problem(on):
    on.any_example(any_problem)


def any_problem(on, data):
    N, C = data.draw(st.integers(1, 4), label="N"), data.draw(st.integers(2, 30), label="C")
    S = data.draw(st.integers(0, 4), label="S")
    T = 2 * S + data.draw(st.integers(1, 9), label="T")
    p = problem(T, N, C, S, seed=data.draw(st.integers(0, 999), label="seed"))
    layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
    p = p._replace(logits=strided(p.logits, layout))
    labelled = data.draw(st.lists(st.booleans(), min_size=N, max_size=N), label="labelled")
    check(
        on,
        p,
        randn(T, N, C, seed=1),
        data.draw(st.sampled_from(DTYPES), label="dtype"),
        data.draw(st.sampled_from(DTYPES), label="teacher_dtype"),
        reduction=data.draw(st.sampled_from(["none", "sum", "mean"]), label="reduction"),
        divergence=data.draw(st.sampled_from(DIVERGENCES), label="divergence"),
        temperature=data.draw(st.sampled_from([0.7, 1.0, 2.0]), label="temperature"),
        labelled=torch.tensor(labelled),
        rescale=data.draw(st.booleans(), label="rescale"),
    )
