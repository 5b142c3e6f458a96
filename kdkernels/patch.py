"""patch: replace torch.nn.functional.ctc_loss by kdkernels.ctc_loss, and restore it."""

import torch.nn.functional as F

from . import _checks, backends
from ._ctc_loss import ctc_loss

_original = None  # torch's own function, while a patch is in force
_active = []  # patches in force, the latest last


class Patch:
    """What :func:`patch` returns: a context manager; ``restore()`` does what leaving it does."""

    def __init__(self, backend):
        def fused_ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            blank=0,
            reduction="mean",
            zero_infinity=False,
        ):
            return ctc_loss(
                log_probs,
                targets,
                input_lengths,
                target_lengths,
                blank,
                reduction,
                zero_infinity,
                backend=backend,
            )

        self.function = fused_ctc_loss

    def restore(self) -> None:
        """Put back the patch before this one, or torch's function. A second call does nothing."""
        global _original
        if self in _active:
            _active.remove(self)
            F.ctc_loss = _active[-1].function if _active else _original
            if not _active:
                _original = None

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()


def patch(*, backend: str | None = None) -> Patch:
    """Replace ``torch.nn.functional.ctc_loss`` by :func:`kdkernels.ctc_loss`, with torch's
    signature.

    ``torch.nn.CTCLoss`` and model libraries that call ``torch.nn.functional.ctc_loss`` follow at
    once; a name bound before (``from torch.nn.functional import ctc_loss``) does not. Losses and
    gradients are those of torch for log-probabilities, except that an impossible target has a
    gradient of 0 and not NaN, and that these are errors: labels and lengths out of range, a
    label that is the blank, targets that are not integers, lengths that are not `[N]`; and
    transforms of ``torch.func`` (``grad``, ``vmap``), batched gradients, ``torch.jit.trace`` and
    ``torch.jit.script``.

    Use it as a context manager (``with kdkernels.patch(): ...``), or call it for good and undo it
    with ``handle = kdkernels.patch(); ...; handle.restore()``. Patches nest, in any order.

    Raises:
        ValueError: for an unknown `backend`.
    """
    global _original
    if backend is not None:
        _checks.choice("patch", "backend", backend, backends.NAMES)
    handle = Patch(backend)
    if not _active:
        _original = F.ctc_loss
    _active.append(handle)
    F.ctc_loss = handle.function
    return handle
