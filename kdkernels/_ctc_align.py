"""Alignment from the same lattice as ctc_loss: soft (ctc_posteriors) and hard (ctc_align)."""

import torch
from torch import Tensor

from . import _checks, _op, backends
from ._checks import Lengths


def ctc_posteriors(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    *,
    batch_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Expected occupancies of a CTC alignment: how likely each frame is spent on each class,
    given the target.

    This is the :math:`\gamma` of :func:`kdkernels.ctc_loss`, :math:`\gamma_{t,c} = \sum_{\pi:
    \pi_t = c} p(\pi) / \sum_\pi p(\pi)` over the paths :math:`\pi` of the target: the gradient of
    the loss is ``softmax - gamma``. Source: Graves et al. (2006). Equivalent to, for one
    utterance::

        loss = kdkernels.ctc_loss(logits, ..., reduction="sum")
        logits.softmax(-1) - torch.autograd.grad(loss, logits)[0]

    Args: as in :func:`kdkernels.ctc_loss`.

    Returns:
        Tensor: `[T, N, C]` (`[N, T, C]` with `batch_first`, `[T, C]` for such logits), float32, or
        float64 for float64 logits; without a derivative. Rows of valid frames sum to 1, padded
        frames are 0, and so is every row of a target that cannot be aligned.

    Raises:
        ValueError, TypeError: as in :func:`kdkernels.ctc_loss`.
    """
    single, arguments = _arguments(
        "ctc_posteriors", logits, targets, input_lengths, target_lengths, blank, batch_first
    )
    gamma = _run("ctc_posteriors", arguments, backend)
    if single:
        return gamma.squeeze(1)
    return gamma.transpose(0, 1) if batch_first else gamma


def ctc_align(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    *,
    batch_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The best CTC path of each utterance, :math:`\arg\max_\pi \prod_t y_{t,\pi_t}`, by the
    Viterbi recursion.

    Same lattice and notation as :func:`kdkernels.ctc_loss`, with a maximum in the place of the
    sum. Ties: the path stays in its state, else comes from the state before, else skips the blank,
    seen from the end. Comparable to ``torchaudio.functional.forced_align``, for a batch and from
    raw logits.

    Args: as in :func:`kdkernels.ctc_loss`.

    Returns:
        (paths, scores): `paths` `[N, T]` int64, the class (a label or blank) of each frame, -1 on
        padded frames; `scores` `[N]`, the log-probability of the path in nats, float32 (float64
        for float64 logits). A target that cannot be aligned gives -1 everywhere and -inf. For `[T,
        C]` logits: `[T]` and a scalar.

    Raises:
        ValueError, TypeError: as in :func:`kdkernels.ctc_loss`.
    """
    single, arguments = _arguments(
        "ctc_align", logits, targets, input_lengths, target_lengths, blank, batch_first
    )
    paths, scores = _run("ctc_align", arguments, backend)
    return (paths.squeeze(0), scores.squeeze(0)) if single else (paths, scores)


def _arguments(op, logits, targets, input_lengths, target_lengths, blank, batch_first):
    if isinstance(logits, torch.Tensor):
        logits = logits.detach()
    single = isinstance(logits, torch.Tensor) and logits.dim() == 2
    logits, *tensors, blank = _checks.ctc(
        op, logits, targets, input_lengths, target_lengths, blank, batch_first
    )
    if not _op.is_traced(logits, *tensors):
        tensors = _checks.arrive(op, logits, *tensors, blank)
    return single, (logits, *tensors, blank)


def _run(op, arguments, backend):
    if _op.is_traced(*arguments[:-1]):
        return getattr(torch.ops.kdkernels, op)(*arguments, backend)
    return backends.select(op, arguments[0].device.type, backend)(*arguments)


def _define(op, outputs, fake):
    def arrive(logits, targets, input_lengths, target_lengths, blank):
        tensors = targets, input_lengths, target_lengths
        return logits, *_checks.arrive(op, logits, *tensors, blank), blank

    schema = (
        "(Tensor logits, Tensor targets, Tensor input_lengths, Tensor target_lengths, "
        f"SymInt blank, str? backend) -> {outputs}"
    )
    _op.define_plain(op, schema, fake, arrive)


def _dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake_posteriors(logits, *_):
    return torch.empty(logits.shape, dtype=_dtype(logits), device=logits.device)


def _fake_align(logits, *_):
    T, N, _C = logits.shape
    return logits.new_empty((N, T), dtype=torch.int64), logits.new_empty((N,), dtype=_dtype(logits))


_define("ctc_posteriors", "Tensor", _fake_posteriors)
_define("ctc_align", "(Tensor, Tensor)", _fake_align)
