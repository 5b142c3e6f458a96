import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import LAYOUTS, kd_oracle, randn, strided
from tolerances import DTYPES, assert_kd_grad, assert_loss

OPS = ("kd_loss",)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def check(on, s, t, dtype, teacher_dtype=None, roundings=1, largest=None, **options):
    s, t = s.to(dtype), t.to(teacher_dtype or dtype)
    loss_expected, grad_s, grad_t = kd_oracle(s, t, **options)
    s, t = on.leaf(s), on.leaf(t)
    if "weight" in options and options["weight"] is not None:
        options["weight"] = options["weight"].to(on.device)
    loss = on.kd_loss(s, t, **options)
    wide = torch.float64 in (s.dtype, t.dtype)
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    loss.sum().backward()
    narrow = torch.float32 if torch.float64 in (s.dtype, t.dtype) and s.dtype != t.dtype else dtype
    assert_loss(loss, loss_expected, narrow, kd=True)
    for x, grad in ((s, grad_s), (t, grad_t)):
        assert x.grad.dtype == x.dtype
        assert_kd_grad(x.grad, grad, x.dtype if narrow is dtype else narrow, roundings, largest)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_definition(on, divergence, dtype, reduction):
    # Half precision mean: the gradient of the sum is rounded, scaled, and rounded again.
    check(
        on,
        randn(4, 7, 33, seed=1, scale=2),
        randn(4, 7, 33, seed=2, scale=2),
        dtype,
        roundings=2,
        divergence=divergence,
        reduction=reduction,
        temperature=2.0,
        beta=0.3,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    ("temperature", "teacher_temperature"), [(1.0, None), (4.0, 1.5), (0.3, 1)]
)
def test_temperatures(on, divergence, rescale, temperature, teacher_temperature):
    check(
        on,
        randn(9, 50, seed=3),
        randn(9, 50, seed=4),
        torch.float32,
        divergence=divergence,
        rescale=rescale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_dtypes_may_differ(on, dtype, teacher_dtype):
    s, t = randn(5, 40, seed=5).to(dtype), randn(5, 40, seed=6).to(teacher_dtype)
    expected, grad_s, grad_t = kd_oracle(s, t)
    s, t = on.leaf(s), on.leaf(t)
    loss = on.kd_loss(s, t)
    loss.backward()
    assert_loss(loss, expected, torch.float32, kd=True)
    assert_kd_grad(s.grad, grad_s, dtype, 2)
    assert_kd_grad(
        t.grad, grad_t, torch.float32 if teacher_dtype.itemsize > 2 else teacher_dtype, 2
    )


@pytest.mark.parametrize("C", [1, 2, 3, 15, 16, 17, 255, 1000, 4097, 40000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_number_of_classes(on, C, divergence):
    s, t = randn(2, C, seed=C, scale=3), randn(2, C, seed=C + 1, scale=3)
    check(on, s, t, torch.float32, divergence=divergence, reduction="none")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_near_convergence(on, divergence, size):
    """KL of 5e-3 down to 5e-7 over 32000 classes: the plain form in float32 loses it altogether."""
    t = randn(3, 32000, seed=7, dtype=torch.float32)
    s = (t + randn(3, 32000, seed=8, scale=size)).float()
    check(on, s, t, torch.float32, divergence=divergence, reduction="none")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("C", [2, 3, 40])
def test_near_convergence_at_two_temperatures(on, C, divergence):
    """Unlike logits whose probabilities are nearly the same."""
    t = randn(50, C, seed=C, scale=3).float()
    s = (t.double() * (3.7 / 1.5) + randn(50, C, seed=C + 1, scale=1e-3)).float()
    options = {"divergence": divergence, "temperature": 3.7, "teacher_temperature": 1.5}
    check(on, s, t, torch.float32, reduction="sum", **options)


@pytest.mark.parametrize("scale", [30.0, 300.0, 3e4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(on, scale, divergence):
    s, t = randn(6, 64, seed=9, scale=scale), randn(6, 64, seed=10, scale=scale)
    # Where both are certain, a gradient is the difference of two probabilities close to 1 or to 0.
    check(on, s, t, torch.float32, divergence=divergence, reduction="none", largest=1.0)


@pytest.mark.parametrize("teacher_temperature", [None, 1.5])
@pytest.mark.parametrize("C", [3, 8])
def test_logits_that_differ_by_a_constant(on, C, teacher_temperature):
    s, t = randn(40, C, seed=12).float(), (randn(40, C, seed=13) + 1000).float()
    options = {"temperature": 3.7, "teacher_temperature": teacher_temperature}
    check(on, s, t, torch.float32, reduction="sum", **options)
    x, y = on.leaf(s[:, :1]), t[:, :1].to(on.device)
    loss = on.kd_loss(x, y, **options)
    loss.backward()
    assert 0 <= loss < 1e-20
    assert x.grad.abs().max() < 1e-10


@pytest.mark.parametrize("C", [2, 5])
def test_each_row_of_few_classes(on, C):
    """Rows between those that are near and those that are far."""
    s, t = (randn(300, C, seed=C + k, scale=0.7).float() for k in (14, 15))
    check(on, s, t, torch.float32, reduction="none", temperature=2.0)


def check_each_row(on, s, t, divergence, **options):
    """Gradients relative to the largest of their own row, to each side alone and to both."""
    s, t = s.float(), t.float()
    options["divergence"] = divergence
    expected, *grads = kd_oracle(s, t, reduction="none", **options)
    for wanted in ((True, False), (False, True), (True, True)):
        x, y = (on.leaf(v) if w else v.to(on.device) for v, w in zip((s, t), wanted, strict=True))
        loss = on.kd_loss(x, y, reduction="none", **options)
        loss.sum().backward()
        assert (loss >= 0).all()
        assert_loss(loss, expected, torch.float32, kd=True)
        for v, grad in ((x, grads[0]), (y, grads[1])):
            for row, expected_row in zip(v.grad if v.requires_grad else (), grad, strict=False):
                assert_kd_grad(row, expected_row, torch.float32)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("certain", ["student", "teacher", "both", "another class each"])
def test_each_row_on_its_way_to_certainty(on, divergence, certain):
    """A row that is certain has gradients that are small against its probabilities."""
    s, t, certainty = randn(17, 70, seed=30), randn(17, 70, seed=31), torch.linspace(0, 16, 17)
    if certain != "teacher":
        s[:, 0] += certainty
    if certain != "student":
        t[:, 1 if certain == "another class each" else 0] += certainty
    check_each_row(on, s, t, divergence)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher_temperature", [2.0, 3.1])
@pytest.mark.parametrize("C", [2, 30, 600])
def test_each_row_from_near_to_far(on, divergence, teacher_temperature, C):
    t = randn(24, C, seed=32, scale=2)
    s = t + randn(24, C, seed=33) * torch.logspace(-3, 1, 24)[:, None]
    options = {"temperature": 2.0, "teacher_temperature": teacher_temperature}
    check_each_row(on, s, t, divergence, **options)


def check_each_row_of_kl(on, s, t):
    """A float64 sum of p d is right to 1e-16, which is more than some losses."""
    s, t = s.float(), t.float()
    top = t.argmax(-1, keepdim=True)
    log_s, log_t = ((v.double() - v.double().gather(-1, top)).log_softmax(-1) for v in (s, t))
    d = log_t - log_s
    x = on.leaf(s)
    loss = on.kd_loss(x, t.to(on.device), reduction="none")
    loss.sum().backward()
    expected = (log_t.exp() * (torch.expm1(-d) + d)).sum(-1)
    assert_loss(loss, expected, torch.float32, kd=True)
    for row, expected_row in zip(x.grad, log_t.exp() * torch.expm1(-d), strict=True):
        assert_kd_grad(row, expected_row, torch.float32)


@pytest.mark.parametrize("noise", [2e-3, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("C", [2, 17, 90])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_each_row_that_is_near_and_certain(on, noise, C, offset):
    """The more certain, the smaller is the gradient; it keeps its digits."""
    t, certainty = randn(34, C, seed=36), torch.linspace(0, 11, 34)
    t[:, 0] += certainty
    check_each_row_of_kl(on, t + randn(34, C, seed=37, scale=noise) + offset, t)


@pytest.mark.parametrize("noise", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("C", [17, 90, 600, 9000])
def test_each_row_of_which_few_classes_differ(on, noise, C):
    """Of sums that have all else in common, their difference keeps its digits."""
    t, certainty = randn(18, C, seed=41, scale=2), torch.linspace(0, 8, 18)
    t[:, 0] += certainty
    few = torch.arange(C) % 16 == 3
    check_each_row_of_kl(on, t + randn(18, C, seed=42, scale=noise) * few, t)


@pytest.mark.parametrize("low", [-12.0, -100.0])
@pytest.mark.parametrize("C", [100, 1000, 9000])
def test_a_class_that_only_the_student_gave_up(on, C, low):
    """Of many that the teacher finds alike: the first, which is its top, or another."""
    s, t = torch.zeros(2, C), torch.zeros(2, C)
    s[0, 0] = s[1, 7] = low
    check_each_row(on, s, t, "forward_kl")


@pytest.mark.parametrize("offset", [2.0**30, -(2.0**30)])
def test_a_constant_that_rounds_the_differences_off(on, offset):
    """Logits of which one side has only the constant: as rounded, all differences are equal."""
    s, t = randn(20, 30, seed=38).float(), torch.full((20, 30), offset)
    for x, y in ((s, t), (t, s)):
        expected, grad, _ = kd_oracle(x, y, reduction="none")
        x = on.leaf(x)
        loss = on.kd_loss(x, y.to(on.device), reduction="none")
        loss.sum().backward()
        assert_loss(loss, expected, torch.float32, kd=True)
        assert_kd_grad(x.grad, grad, torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("C", [5, 100])
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.5, 900.0), (900.0, 0.5)])
def test_temperatures_far_apart(on, divergence, C, temperature, teacher_temperature):
    """Logits that are large at one temperature and small at the other."""
    s, t = randn(24, C, seed=39), randn(24, C, seed=40)
    size = torch.logspace(-0.5, 1, 24)[:, None]
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    for a, b in ((size, size), (temperature * size, teacher_temperature * size)):
        check_each_row(on, a * s, b * t, divergence, **options)


@pytest.mark.parametrize("step", [1 / 70, 1 / 64, 1 / 58, 0.2, 3.0])
@pytest.mark.parametrize("beta", [1e-4, 0.1, 0.5, 0.97])
def test_any_mixture(on, step, beta):
    """Every d is one of two numbers."""
    t = randn(6, 50, seed=34)
    s = t + step * (randn(6, 50, seed=35) > 0)
    check_each_row(on, s, t, "jsd", beta=beta)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_rows_of_few_values(on, divergence):
    """Their sums are rounded the same way again and again."""
    g = torch.Generator().manual_seed(36)
    s, t = (
        torch.randn(12, 2, generator=g).gather(1, torch.randint(2, (12, 900), generator=g))
        for _ in range(2)
    )
    s[:, 0] += torch.linspace(0, 11, 12)
    s, t = on.leaf(s), t.to(on.device)
    expected, grad, _ = kd_oracle(s, t, divergence=divergence, reduction="none")
    loss = on.kd_loss(s, t, divergence=divergence, reduction="none")
    loss.sum().backward()
    assert_loss(loss, expected, torch.float32, kd=True)
    for row, expected_row in zip(s.grad, grad, strict=True):
        assert_kd_grad(row, expected_row, torch.float32)


def test_certain_rows_that_agree(on):
    """Their gradients are next to nothing, and right against a probability."""
    s = randn(200, 33, seed=37, scale=20).float()
    t = (s + randn(200, 33, seed=38, scale=0.1)).float()
    _, expected, _ = kd_oracle(s, t, reduction="sum")
    x = on.leaf(s)
    on.kd_loss(x, t.to(on.device), reduction="sum").backward()
    torch.testing.assert_close(x.grad.double().cpu(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart(on, divergence):
    """The teacher certain of one class, the student of another."""
    s = torch.zeros(1, 20)
    t = torch.zeros(1, 20)
    s[0, 3], t[0, 11] = 60.0, 60.0
    check(on, s, t, torch.float32, divergence=divergence)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_identical_logits_are_exactly_zero(on, dtype, divergence, temperature):
    x = randn(5, 301, seed=11, scale=5).to(dtype)
    s, t = on.leaf(x), on.leaf(x.clone())
    loss = on.kd_loss(s, t, divergence=divergence, temperature=temperature, reduction="none")
    loss.sum().backward()
    assert (loss == 0).all()
    assert (s.grad == 0).all()
    assert (t.grad == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_never_negative(on, divergence):
    t = randn(200, 500, seed=12, dtype=torch.float32)
    for size in (1e-6, 1e-5, 1e-4, 1.0):
        s = (t + randn(200, 500, seed=13, scale=size)).float()
        loss = on.kd_loss(s.to(on.device), t.to(on.device), divergence=divergence, reduction="none")
        assert (loss >= 0).all()


def test_known_value(on):
    """(p, 1 - p) against (q, 1 - q), by hand."""
    p, q = 0.8, 0.3
    t = torch.tensor([[math.log(p), math.log(1 - p)]], device=on.device)
    s = torch.tensor([[math.log(q), math.log(1 - q)]], device=on.device)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert on.kd_loss(s, t).item() == pytest.approx(kl, rel=1e-6)
    reverse = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert on.kd_loss(s, t, divergence="reverse_kl").item() == pytest.approx(reverse, rel=1e-6)


def test_the_line_it_replaces(on):
    import torch.nn.functional as F

    s, t, tau = randn(8, 30, seed=14).to(on.device), randn(8, 30, seed=15).to(on.device), 2.5
    expected = (
        F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction="batchmean") * tau**2
    )
    loss = on.kd_loss(s, t, temperature=tau, reduction="batchmean")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_shift_of_logits_changes_nothing(on, divergence):
    s, t = randn(6, 20, seed=16).to(on.device), randn(6, 20, seed=17).to(on.device)
    loss = on.kd_loss(s, t, divergence=divergence)
    shifted = on.kd_loss(s + 17.0, t - 250.0, divergence=divergence)
    torch.testing.assert_close(loss, shifted, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float32, torch.float64, torch.float16], ids=str
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight(on, dtype, reduction):
    weight = torch.tensor([[1, 0, 3], [0, 2, 1]], dtype=dtype)
    check(
        on,
        randn(2, 3, 21, seed=18),
        randn(2, 3, 21, seed=19),
        torch.float32,
        weight=weight,
        reduction=reduction,
    )


def test_weight_of_any_strides(on):
    s, t = randn(4, 3, 8, seed=20).to(on.device), randn(4, 3, 8, seed=21).to(on.device)
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).to(on.device)
    loss = on.kd_loss(s, t, weight=weight.t())
    torch.testing.assert_close(
        loss, on.kd_loss(s, t, weight=weight.t().contiguous()), rtol=0, atol=0
    )
    one = torch.ones(1, 1, device=on.device).expand(4, 3)
    torch.testing.assert_close(on.kd_loss(s, t, weight=one), on.kd_loss(s, t), rtol=1e-14, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(on, layout):
    # Of an odd number of classes: whatever the strides, no load takes two, and sums have one order.
    s, t = randn(4, 5, 19, seed=22).to(on.device), randn(4, 5, 19, seed=23).to(on.device)
    expected = on.kd_loss(s, t, reduction="none")
    x = on.leaf(strided(s, layout))
    loss = on.kd_loss(x, t, reduction="none")
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert_kd_grad(x.grad, kd_oracle(s, t, reduction="sum")[1], torch.float64)
    assert torch.equal(on.kd_loss(s, strided(t, layout), reduction="none"), expected)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (2, 3, 2, 6), (1, 1, 1, 1)])
def test_leading_dims(on, shape):
    s, t = randn(*shape, seed=24), randn(*shape, seed=25)
    check(on, s, t, torch.float32, reduction="none")
    check(on, s, t, torch.float32, reduction="mean")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(on, divergence):
    s, t = on.leaf(randn(3, 5, seed=26)), on.leaf(randn(3, 5, seed=27))
    weight = torch.tensor([1.0, 0.0, 2.5], device=on.device)

    def loss(s, t):
        return on.kd_loss(
            s,
            t,
            weight=weight,
            divergence=divergence,
            temperature=1.7,
            teacher_temperature=0.8,
            beta=0.2,
        )

    assert torch.autograd.gradcheck(loss, (s, t))


@hypothesis.given(data=st.data())
def test_any_problem(on, data):
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3), label="rows")
    C = data.draw(st.integers(1, 70), label="C")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    teacher_dtype = data.draw(st.sampled_from(DTYPES), label="teacher_dtype")
    reduction = data.draw(st.sampled_from(REDUCTIONS), label="reduction")
    divergence = data.draw(st.sampled_from(DIVERGENCES), label="divergence")
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.3]), label="temperature")
    seed = data.draw(st.integers(0, 999), label="seed")
    scale = data.draw(st.sampled_from([0.1, 1.0, 5.0]), label="scale")
    weighted = data.draw(st.booleans(), label="weighted")
    layouts = [data.draw(st.sampled_from(LAYOUTS), label="layout") for _ in range(2)]
    s = randn(*shape, C, seed=seed, scale=scale).to(dtype)
    t = randn(*shape, C, seed=seed + 1, scale=scale).to(teacher_dtype)
    weight = randn(*shape, seed=seed + 2).abs() if weighted else None
    options = {
        "divergence": divergence,
        "reduction": reduction,
        "temperature": temperature,
        "weight": weight,
    }
    if s.numel():
        expected, grad_s, grad_t = kd_oracle(s, t, **options)
    else:
        expected = torch.zeros(shape if reduction == "none" else (), dtype=torch.float64)
        grad_s, grad_t = torch.zeros_like(s), torch.zeros_like(t)
    s, t = (on.leaf(strided(x, k)) for x, k in zip((s, t), layouts, strict=True))
    options["weight"] = weight if weight is None else weight.to(on.device)
    loss = on.kd_loss(s, t, **options)
    loss.sum().backward()
    narrow = torch.float64 if dtype == teacher_dtype == torch.float64 else torch.float32
    assert_loss(loss, expected, narrow, kd=C > 1)
    for x, grad in ((s, grad_s), (t, grad_t)):
        assert_kd_grad(x.grad, grad, x.dtype if x.dtype.itemsize == 2 else narrow, 2)
