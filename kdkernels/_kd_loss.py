"""kd_loss: the divergence between a teacher and a student, from raw logits to gradient in one
pass."""

import torch
from torch import Tensor

from . import _checks, _op

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    weight: Tensor | None = None,
    reduction: str = "mean",
    rescale: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Knowledge-distillation loss of a student against a teacher, fused from raw logits to
    gradient.

    With :math:`p_t = \mathrm{softmax}(t / \tau_t)` and :math:`p_s = \mathrm{softmax}(s / \tau_s)`,
    each row costs

    - ``"forward_kl"``: :math:`\mathrm{KL}(p_t \,\|\, p_s) = \sum_c p_t (e^{-d} - 1 + d)`, with
      :math:`d = \log p_t - \log p_s`;
    - ``"reverse_kl"``: :math:`\mathrm{KL}(p_s \,\|\, p_t)`;
    - ``"jsd"``: :math:`\beta\,\mathrm{KL}(p_t \,\|\, m) + (1 - \beta)\,\mathrm{KL}(p_s \,\|\, m)`,
      with :math:`m = \beta p_t + (1 - \beta) p_s`,

    times its weight, and times :math:`\tau_s^2` with `rescale`. The sum for the forward KL has the
    value of :math:`\sum_c p_t d`, because both distributions sum to 1, and terms that are never
    negative: near convergence it is accurate where the usual form has lost every digit. The
    gradient of a row with respect to `s` is
    :math:`(p_s - p_t) / \tau_s` for the forward KL; identical logits give a loss and a gradient of
    exactly 0.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), whose
    :math:`T` is :math:`\tau` here. Equivalent to, for rows `[N, C]`, no weight and
    ``reduction="batchmean"``::

        F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction="batchmean") * tau**2

    Args:
        student_logits: `[*, C]`, float32, float64, bfloat16 or float16, any strides. Unnormalised.
        teacher_logits: `[*, C]`, on the same device; its dtype may differ. It gets a gradient too
            if it requires one; detach it (or compute it under ``torch.no_grad()``) otherwise.
        temperature: of the student, > 0.
        teacher_temperature: > 0; the student's unless given.
        divergence: ``"forward_kl"``, ``"reverse_kl"`` or ``"jsd"``.
        beta: weight of the teacher in the mixture of ``"jsd"``, in (0, 1).
        weight: `[*]`, bool or floating: the weight of each row. A row of weight 0 is not read (it
            may hold NaN) and gets a gradient of exactly 0. Its values are not checked: a negative
            one reverses the row's gradient.
        reduction: ``"none"`` gives `[*]`; ``"sum"``; ``"mean"`` divides the sum by the sum of
            weights (the number of rows without `weight`; 0 where every weight is 0);
            ``"batchmean"`` divides it by the size of dim 0.
        rescale: multiply by the student's temperature squared, so that gradients keep their size.
        backend: one of ``kdkernels.available("kd_loss")``, or None for the best there is.

    Returns:
        Tensor: in nats, float32, or float64 where either of the logits is float64. Half-precision
        logits are read as they are; arithmetic is in float32 at least, and gradients are rounded to
        the dtype of the logits once, or twice where the loss is multiplied. Classes of logit -inf
        have probability 0 and a gradient of 0; a class that has mass where the divergence divides
        by a probability of 0 makes the loss of that row infinite, and its gradients stay finite. A
        probability too small for the arithmetic (below 1e-37 in float32) may count as none, and
        that of a mask such as -1e4 does.

    Raises:
        ValueError: for shapes, devices, temperatures, names and `beta`.
        TypeError: for dtypes.
    """
    op = "kd_loss"
    student_logits = _checks.logits(op, "student_logits", student_logits)
    teacher_logits = _checks.teacher(op, student_logits, teacher_logits)
    temperature, teacher_temperature, beta = _checks.distillation(
        op, temperature, teacher_temperature, divergence, beta
    )
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    rows = student_logits.shape[:-1]
    if weight is not None:
        weight = _checks.weight(op, "weight", weight, rows, student_logits.device)
    if reduction == "batchmean" and not rows:
        raise _checks.bad_value(op, "student_logits", "of 2 dims or more for batchmean", "1 dim")

    wanted = (_op.wants_grad(student_logits), _op.wants_grad(teacher_logits))
    divisor = None
    if torch.float16 in (student_logits.dtype, teacher_logits.dtype) and any(wanted):
        # A gradient divided by the number of rows is too small for float16; a loss scale comes
        # only afterwards. Weights of any size mean the same: those up to 1 fit.
        if reduction == "mean" and weight is not None and weight.numel():
            weight = weight.double()
            largest = weight.abs().max()
            weight = weight / torch.where(largest == 0, 1, largest)
        divisor = _divisor(reduction, weight, student_logits)
    options = (
        temperature,
        teacher_temperature,
        divergence,
        beta,
        reduction if divisor is None else "sum",
        _checks.flag(op, "rescale", rescale),
    )
    (loss,) = _op.call(op, (student_logits, teacher_logits, weight), options, wanted, backend)
    return loss if divisor is None else loss / divisor


def _divisor(reduction, weight, student_logits):
    if reduction == "batchmean":
        return max(student_logits.shape[0], 1)
    if reduction != "mean":
        return None
    if weight is None:
        return max(student_logits.numel() // student_logits.shape[-1], 1)
    total = weight.sum(dtype=torch.float64).float()
    return torch.where(total == 0, 1.0, total)


def _fake_losses(student_logits, teacher_logits, *args):
    reduction = args[5]
    either = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    shape = student_logits.shape[:-1] if reduction == "none" else ()
    return (student_logits.new_empty(shape, dtype=torch.float64 if either else torch.float32),)


_op.define(
    "kd_loss",
    "(Tensor student_logits, Tensor teacher_logits, Tensor? weight, float temperature, "
    "float teacher_temperature, str divergence, float beta, str reduction, bool rescale, "
    "bool student_grad, bool teacher_grad, str? backend) -> (Tensor, Tensor, Tensor)",
    _fake_losses,
    n_logits=2,
)
