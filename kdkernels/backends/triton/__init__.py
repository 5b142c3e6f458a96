"""Triton kernels: every operator without a compiler on the machine. On a GPU; on a CPU under
TRITON_INTERPRET=1, which is slow and for tests.
"""

from .common import INTERPRETED
from .ctc_align import ctc_align
from .ctc_loss import ctc_kd_loss_forward, ctc_loss_forward, ctc_posteriors
from .kd_loss import kd_loss_forward, scale_grad_

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss", "ctc_posteriors", "ctc_align")

__all__ = [
    "ctc_align",
    "ctc_kd_loss_forward",
    "ctc_loss_forward",
    "ctc_posteriors",
    "kd_loss_forward",
    "scale_grad_",
    "supports",
]


def supports(op, device_type):
    return op in OPS and (device_type == "cuda" or (device_type == "cpu" and INTERPRETED))
