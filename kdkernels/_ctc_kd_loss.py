"""ctc_kd_loss: CTC and distillation together; each logit tensor is read once for both."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _op
from ._checks import Lengths
from ._ctc_loss import REDUCTIONS


class CTCKDTerms(NamedTuple):
    """What ctc_kd_loss returns: the loss to differentiate, and its two terms, detached, for
    logging."""

    loss: torch.Tensor
    ctc: torch.Tensor
    kd: torch.Tensor


def ctc_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    kd_weight: float = 0.5,
    ctc_weight: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    labelled: Tensor | Sequence[bool] | None = None,
    frame_weight: Tensor | None = None,
    rescale: bool = True,
    batch_first: bool = False,
    backend: str | None = None,
) -> CTCKDTerms:
    r"""CTC against a transcript and distillation against a teacher, frame by frame, in one
    operator.

    .. math:: \text{loss} = w_{ctc} \cdot \text{ctc} + w_{kd} \cdot \text{kd}

    with :func:`kdkernels.ctc_loss` of the student over utterances that are labelled, and
    :func:`kdkernels.kd_loss` over the frames t < input_length of every utterance: the maths,
    dtypes and edges are theirs. Each logit tensor is read for the statistics of both terms once,
    and one gradient tensor is written. A term of weight 0 is absent from the loss, even where it
    is infinite; a target that cannot be aligned makes ctc infinite and leaves the gradient of kd
    alone.

    Sources: Graves et al. (2006); Hinton et al. (2015). Equivalent to, without masks and with [T,
    N, C] logits::

        ctc = kdkernels.ctc_loss(student_logits, targets, input_lengths, target_lengths)
        kd = kdkernels.kd_loss(student_logits, teacher_logits, temperature=tau,
                               weight=torch.arange(T)[:, None] < input_lengths)
        loss = ctc_weight * ctc + kd_weight * kd

    Args:
        student_logits, teacher_logits: `[T, N, C]`, `[N, T, C]` with `batch_first`, or `[T, C]`;
            their dtypes may differ. The teacher gets a gradient too if it requires one.
        targets, input_lengths, target_lengths, blank, zero_infinity: as in
            :func:`kdkernels.ctc_loss`. Labels of an utterance that is not labelled are never
            looked at.
        reduction: ``"mean"``: ctc_loss's mean over the labelled utterances (0 without any) and
            kd_loss's mean over the frames that count; ``"sum"``: the two sums; ``"none"``: `[N]`
            for each, kd summed over the frames of an utterance (scalars for `[T, C]`).
        kd_weight: :math:`w_{kd}`.
        ctc_weight: :math:`w_{ctc}`; ``1 - kd_weight`` unless given. With a `kd_weight` outside
            [0, 1] it must be: one of the two would be negative.
        temperature, teacher_temperature, divergence, beta, rescale: as in
            :func:`kdkernels.kd_loss`.
        labelled: bool `[N]`: which utterances have a transcript; all of them unless given.
        frame_weight: bool or floating `[T, N]` (`[N, T]` with `batch_first`, `[T]` for `[T, C]`):
            weight of each frame in kd. In frames of weight 0 the teacher is not read.
        batch_first: logits are `[N, T, C]`.
        backend: one of ``kdkernels.available("ctc_kd_loss")``, or None for the best there is.

    Returns:
        CTCKDTerms: a named tuple ``(loss, ctc, kd)``, in nats, float32 (float64 where either of
        the logits is); `ctc` and `kd` are without their weights, and detached.

    Raises:
        ValueError: for shapes, devices, temperatures, names, and values of `blank`, lengths and
        labels. TypeError: for dtypes.
    """
    op = "ctc_kd_loss"
    student_logits = _checks.logits(op, "student_logits", student_logits)
    teacher_logits = _checks.teacher(op, student_logits, teacher_logits)
    single = student_logits.dim() == 2
    student_logits, *tensors, blank = _checks.ctc(
        op,
        student_logits,
        targets,
        input_lengths,
        target_lengths,
        blank,
        batch_first,
        "student_logits",
    )
    if single:
        teacher_logits = teacher_logits.unsqueeze(1)
    elif batch_first:
        teacher_logits = teacher_logits.transpose(0, 1)
    T, N, _ = student_logits.shape
    device = student_logits.device
    temperature, teacher_temperature, beta = _checks.distillation(
        op, temperature, teacher_temperature, divergence, beta
    )
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    kd_weight, ctc_weight = _checks.term_weights(op, kd_weight, ctc_weight)
    if frame_weight is not None:
        shape = (T,) if single else (N, T) if batch_first else (T, N)
        frame_weight = _checks.weight(op, "frame_weight", frame_weight, shape, device)
        if single:
            frame_weight = frame_weight.unsqueeze(1)
        elif batch_first:
            frame_weight = frame_weight.t()
    if labelled is not None:
        labelled = _checks.labelled(op, labelled, N, single)
    wanted = (_op.wants_grad(student_logits), _op.wants_grad(teacher_logits))
    scale = 1.0
    if (
        torch.float16 in (student_logits.dtype, teacher_logits.dtype)
        and reduction == "mean"
        and any(wanted)
    ):
        # A gradient divided by the number of frames is too small for float16; a loss scale comes
        # only afterwards. No larger than this: there may be few frames or utterances that count.
        # Comparisons, because torch.compile would compile again for every N·T that is counted.
        while scale < 4096 and scale <= N * T:
            scale *= 2
    options = (
        blank,
        reduction,
        _checks.flag(op, "zero_infinity", zero_infinity),
        ctc_weight * scale,
        kd_weight * scale,
        temperature,
        teacher_temperature,
        divergence,
        beta,
        _checks.flag(op, "rescale", rescale),
    )
    arguments = (student_logits, teacher_logits, *tensors, labelled, frame_weight)
    if not _op.is_traced(*arguments):
        arguments = _arrive(*arguments, blank)[:-1]
    terms = _op.call(op, arguments, options, wanted, backend)
    if single and reduction == "none":
        terms = [x.squeeze(0) for x in terms]
    loss, ctc, kd = terms
    return CTCKDTerms(loss if scale == 1 else loss / scale, ctc, kd)


def _arrive(
    student, teacher, targets, input_lengths, target_lengths, labelled, frame_weight, blank,
    *options,
):  # fmt: skip
    tensors = targets, input_lengths, target_lengths
    tensors = _checks.arrive("ctc_kd_loss", student, *tensors, blank, labelled)
    if labelled is not None:
        labelled = labelled.to(student.device, non_blocking=True)
    return student, teacher, *tensors, labelled, frame_weight, blank, *options


def _fake_losses(student_logits, teacher_logits, *args):
    reduction = args[6]
    either = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    shape = (student_logits.shape[1],) if reduction == "none" else ()
    dtype = torch.float64 if either else torch.float32
    return tuple(student_logits.new_empty(shape, dtype=dtype) for _ in range(3))


_op.define(
    "ctc_kd_loss",
    "(Tensor student_logits, Tensor teacher_logits, Tensor targets, Tensor input_lengths, "
    "Tensor target_lengths, Tensor? labelled, Tensor? frame_weight, SymInt blank, str reduction, "
    "bool zero_infinity, float ctc_weight, float kd_weight, float temperature, "
    "float teacher_temperature, str divergence, float beta, bool rescale, bool student_grad, "
    "bool teacher_grad, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_losses,
    arrive=_arrive,
    n_logits=2,
)
