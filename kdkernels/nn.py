"""The losses as torch.nn.Module: options at construction, tensors at the call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _ctc_loss, _kd_loss, backends
from ._checks import Lengths
from ._ctc_kd_loss import CTCKDTerms, ctc_kd_loss
from ._ctc_loss import ctc_loss
from ._kd_loss import kd_loss


class _Loss(torch.nn.Module):
    _options = ()

    def _keep(self, reductions, **options):
        name = type(self).__name__
        _checks.choice(name, "reduction", options["reduction"], reductions)
        if options["backend"] is not None:
            _checks.choice(name, "backend", options["backend"], backends.NAMES)
        if "temperature" in options:
            keys = ("temperature", "teacher_temperature", "divergence", "beta")
            _checks.distillation(name, *(options[key] for key in keys))
        if "kd_weight" in options:
            _checks.term_weights(name, options["kd_weight"], options["ctc_weight"])
        if "blank" in options:
            _checks.integer(name, "blank", options["blank"])
        for key in ("zero_infinity", "rescale", "batch_first"):
            if key in options:
                _checks.flag(name, key, options[key])
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def _kept(self):
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self._kept().items())


class KDLoss(_Loss):
    """:func:`kdkernels.kd_loss` as a module: ``KDLoss(temperature=2.0)(student_logits,
    teacher_logits)``."""

    def __init__(
        self,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        reduction: str = "mean",
        rescale: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(
            _kd_loss.REDUCTIONS,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            divergence=divergence,
            beta=beta,
            reduction=reduction,
            rescale=rescale,
            backend=backend,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        return kd_loss(student_logits, teacher_logits, weight=weight, **self._kept())


class CTCLoss(_Loss):
    """:func:`kdkernels.ctc_loss` as a module, made and called with the arguments of
    ``torch.nn.CTCLoss``, in their order; its ``log_probs`` are ``logits`` here."""

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
        batch_first: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(
            _ctc_loss.REDUCTIONS,
            blank=blank,
            reduction=reduction,
            zero_infinity=zero_infinity,
            batch_first=batch_first,
            backend=backend,
        )

    def forward(
        self, logits: Tensor, targets: Tensor, input_lengths: Lengths, target_lengths: Lengths
    ) -> Tensor:
        return ctc_loss(logits, targets, input_lengths, target_lengths, **self._kept())


class CTCKDLoss(_Loss):
    """:func:`kdkernels.ctc_kd_loss` as a module; it returns the named tuple ``(loss, ctc, kd)``."""

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
        kd_weight: float = 0.5,
        ctc_weight: float | None = None,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        rescale: bool = True,
        batch_first: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(
            _ctc_loss.REDUCTIONS,
            blank=blank,
            reduction=reduction,
            zero_infinity=zero_infinity,
            kd_weight=kd_weight,
            ctc_weight=ctc_weight,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            divergence=divergence,
            beta=beta,
            rescale=rescale,
            batch_first=batch_first,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor,
        input_lengths: Lengths,
        target_lengths: Lengths,
        labelled: Tensor | Sequence[bool] | None = None,
        frame_weight: Tensor | None = None,
    ) -> CTCKDTerms:
        return ctc_kd_loss(
            student_logits,
            teacher_logits,
            targets,
            input_lengths,
            target_lengths,
            labelled=labelled,
            frame_weight=frame_weight,
            **self._kept(),
        )
