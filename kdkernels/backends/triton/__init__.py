"""Triton kernels: every operator without a compiler on the machine. On a GPU; on a CPU under
TRITON_INTERPRET=1, which is slow and for tests.
"""

import triton

from .common import INTERPRETED
from .ctc_align import ctc_align
from .ctc_loss import ctc_kd_loss_forward, ctc_loss_forward, ctc_posteriors
from .kd_loss import kd_loss_forward, scale_grad_

__all__ = [
    "ctc_align",
    "ctc_kd_loss_forward",
    "ctc_loss_forward",
    "ctc_posteriors",
    "kd_loss_forward",
    "scale_grad_",
    "supports",
]


# Before 3.4 the compiler refuses the recursion's kernels (and has no tl.gather before 3.3).
NEW_ENOUGH = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 4)


def supports(device_type):
    return INTERPRETED if device_type == "cpu" else device_type == "cuda" and NEW_ENOUGH
