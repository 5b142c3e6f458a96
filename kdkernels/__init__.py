"""kdkernels: fused knowledge-distillation losses for speech recognisers, from raw logits to
gradient.

Operators: kd_loss, ctc_loss, ctc_kd_loss, ctc_posteriors, ctc_align; modules: KDLoss, CTCLoss,
CTCKDLoss; drop-in: patch. ``available(op, device_type)`` lists the backends of this machine, best
first; KDKERNELS_BACKEND names the one to use where a call does not. ``empty_cache()`` gives the
memory of freed gradients on the CPU back.
"""

import torch  # noqa: F401  before the extension, which shares its OpenMP runtime

from ._ctc_align import ctc_align, ctc_posteriors
from ._ctc_kd_loss import CTCKDTerms, ctc_kd_loss
from ._ctc_loss import ctc_loss
from ._kd_loss import kd_loss
from ._memory import empty_cache
from .backends import available
from .nn import CTCKDLoss, CTCLoss, KDLoss
from .patch import patch

__version__ = "0.1.0"

__all__ = [
    "CTCKDLoss",
    "CTCKDTerms",
    "CTCLoss",
    "KDLoss",
    "available",
    "ctc_align",
    "ctc_kd_loss",
    "ctc_loss",
    "ctc_posteriors",
    "empty_cache",
    "kd_loss",
    "patch",
]
