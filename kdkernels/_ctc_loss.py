"""ctc_loss: connectionist temporal classification, from raw logits to gradient."""

import torch
from torch import Tensor

from . import _checks, _op
from ._checks import Lengths

REDUCTIONS = ("none", "sum", "mean")


def ctc_loss(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    batch_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""CTC loss, fused from raw logits to gradient.

    With :math:`y_{t,c} = \mathrm{softmax}(\text{logits})_{t,c}`, the loss of an utterance is
    :math:`-\log \sum_\pi \prod_t y_{t,\pi_t}` over the paths :math:`\pi` of :math:`T_n` classes
    that become the target once repeats are merged and blanks removed. The sum is made frame by
    frame over the 2S+1 states blank, label 1, blank, ..., label S, blank, from the front
    (:math:`\alpha`) and from the back (:math:`\beta`), and the gradient with respect to the logits
    is

    .. math:: \partial\,\text{loss} / \partial\,\text{logits}_{t,c} = y_{t,c} - \gamma_{t,c},

    :math:`\gamma_{t,c}` being the probability, given the target, that frame t is spent on class c
    (the occupancy, see :func:`kdkernels.ctc_posteriors`).

    Source: Graves, Fernández, Gomez and Schmidhuber, "Connectionist Temporal Classification"
    (2006); unlike there, :math:`\beta` leaves out the emission of its own frame. Equivalent to::

        F.ctc_loss(logits.log_softmax(-1), targets, input_lengths, target_lengths, blank,
                   reduction, zero_infinity)

    Log-probabilities may be passed as logits: log_softmax leaves them unchanged, and loss and
    gradient are then those of ``F.ctc_loss``, which makes this a drop-in (:func:`kdkernels.patch`).

    Args:
        logits: `[T, N, C]`, `[N, T, C]` with `batch_first`, or `[T, C]` for one utterance;
            float32, float64, bfloat16 or float16, any strides.
        targets: padded `[N, S]` or concatenated `[sum(target_lengths)]` (`[S]` with `[T, C]`), any
            integer dtype. Labels lie in [0, C) and differ from `blank`; entries past a target's
            length are never looked at.
        input_lengths, target_lengths: `[N]` (a single number with `[T, C]`), integer tensors on
            any device, or sequences of ints, in [0, T] and [0, S].
        blank: class of the blank, in [0, C).
        reduction: ``"none"`` gives `[N]` (a scalar for `[T, C]`); ``"sum"``; ``"mean"`` divides
            each loss by max(target_length, 1) and takes the mean over the batch.
        zero_infinity: give a target that cannot be aligned a loss of 0 instead of inf; its
            gradient is 0 anyhow.
        batch_first: `logits` is `[N, T, C]`.
        backend: one of ``kdkernels.available("ctc_loss")``, or None for the best there is.

    Returns:
        Tensor: in nats, float32 (float64 for float64 logits). Half-precision logits are read as
        they are, and their gradient is rounded once, or twice where the loss is multiplied.

    Raises:
        ValueError: for shapes, and for values of `blank`, lengths and labels. Values that lie on a
            GPU are not read on the host: there a bad length or label gives nan for its utterance.
        TypeError: for dtypes.
    """
    op = "ctc_loss"
    single = isinstance(logits, torch.Tensor) and logits.dim() == 2
    logits, *tensors, blank = _checks.ctc(
        op, logits, targets, input_lengths, target_lengths, blank, batch_first
    )
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    if not _op.is_traced(logits, *tensors):
        logits, *tensors, blank = _arrive(logits, *tensors, blank)

    wanted = (_op.wants_grad(logits),)
    # A gradient divided by N·S is too small for float16; a loss scale comes only afterwards.
    late = logits.dtype == torch.float16 and reduction == "mean" and wanted[0]
    options = (
        blank,
        "none" if late else reduction,
        _checks.flag(op, "zero_infinity", zero_infinity),
    )
    (loss,) = _op.call(op, (logits, *tensors), options, wanted, backend)
    if late:
        labels = tensors[2].to(loss.device, non_blocking=True)
        return (loss / labels.clamp(min=1)).sum() / max(loss.shape[0], 1)
    return loss.squeeze(0) if single and reduction == "none" else loss


def _arrive(logits, targets, input_lengths, target_lengths, blank, *options):
    tensors = targets, input_lengths, target_lengths
    return logits, *_checks.arrive("ctc_loss", logits, *tensors, blank), blank, *options


def _fake_losses(logits, targets, input_lengths, target_lengths, blank, reduction, *_):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (logits.new_empty((logits.shape[1],) if reduction == "none" else (), dtype=dtype),)


_op.define(
    "ctc_loss",
    "(Tensor logits, Tensor targets, Tensor input_lengths, Tensor target_lengths, SymInt blank, "
    "str reduction, bool zero_infinity, bool grad, str? backend) -> (Tensor, Tensor)",
    _fake_losses,
    arrive=_arrive,
)
