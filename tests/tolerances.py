"""The one table of tolerances, by dtype of the logits; expected values are float64, from rounded
inputs.

loss        error of a loss, relative to max(1, |loss|)
kd_loss     error of kd_loss, relative to |loss|: it may be 1e-7 and must still be right
ctc_grad    error of a gradient of CTC, absolute, for a gradient of the sum over utterances
kd_grad     error of a gradient of kd_loss, relative to its largest element
rounding    relative error of one rounding to the dtype, allowed on every element of a gradient
smallest    what underflow may cost: the smallest number of float16, else the smallest normal one
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    loss: float
    kd_loss: float
    ctc_grad: float
    kd_grad: float
    rounding: float
    smallest: float


TOLERANCES = {
    torch.float32: Tolerance(1e-6, 3e-6, 2e-5, 2e-6, 0.0, 2.0**-126),
    torch.float64: Tolerance(1e-11, 1e-11, 1e-11, 1e-11, 0.0, 2.0**-1022),
    torch.bfloat16: Tolerance(1e-6, 3e-6, 2e-5, 2e-6, 2.0**-8, 2.0**-126),
    torch.float16: Tolerance(1e-6, 3e-6, 2e-5, 2e-6, 2.0**-11, 2.0**-24),
}
DTYPES = tuple(TOLERANCES)


def assert_loss(loss, expected, dtype, kd=False):
    """Losses agree; infinities at the same places."""
    tolerance = TOLERANCES[dtype]
    loss, expected = loss.detach().double().cpu(), expected.detach().double().cpu()
    assert loss.shape == expected.shape
    finite = expected.isfinite()
    torch.testing.assert_close(loss[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    error = (loss - expected)[finite].abs()
    expected = expected[finite].abs()
    bound = tolerance.kd_loss * expected if kd else tolerance.loss * expected.clamp(min=1)
    assert (error <= bound).all(), f"largest ratio to the bound {(error / bound).max():.3g}"


def assert_ctc_grad(grad, expected, dtype, roundings=1):
    tolerance = TOLERANCES[dtype]
    absolute = tolerance.ctc_grad + tolerance.smallest
    _assert_grad(grad, expected, absolute, roundings * tolerance.rounding)


def assert_kd_grad(grad, expected, dtype, roundings=1, largest=None):
    """`largest`: what the error is relative to, where the largest gradient is itself a
    cancellation."""
    tolerance = TOLERANCES[dtype]
    if largest is None:
        largest = expected.abs().max().item() if expected.numel() else 0.0
    absolute = tolerance.kd_grad * largest + tolerance.smallest
    _assert_grad(grad, expected, absolute, roundings * tolerance.rounding)


def _assert_grad(grad, expected, absolute, relative):
    grad, expected = grad.detach().double().cpu(), expected.detach().double().cpu()
    assert grad.shape == expected.shape
    assert not grad.isnan().any()
    bound = absolute + relative * expected.abs()
    error = (grad - expected).abs()
    wrong = error > bound
    assert not wrong.any(), f"largest error {error.max():.3g}, {wrong.sum()} of {wrong.numel()}"
