"""The training losses, and the frames and utterances over which they are taken.

Each loss takes (logits [N, T, C], lengths [N], batch, progress in [0, 1)). A mean is multiplied by
the batch's share of the step, so that the pieces of a step, in one process or in several, add up to
the step computed at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

from .batches import Batch
from .settings import Settings

SCHEDULES = {"constant": lambda x: 1.0, "rise": lambda x: x, "fall": lambda x: 1 - x}


def ctc(logits: Tensor, lengths: Tensor, batch: Batch, progress: float) -> Tensor:
    """CTC of a batch whose utterances all have transcripts."""
    loss = kd.ctc_loss(
        logits, batch.targets, lengths, batch.target_lengths, zero_infinity=True, batch_first=True
    )
    return loss * batch.labelled_share


def distil(
    logits: Tensor, lengths: Tensor, batch: Batch, progress: float, settings: Settings
) -> Tensor:
    """CTC where there is a transcript, and divergence from the teacher."""
    return kd.ctc_kd_loss(
        logits,
        batch.teacher_logits,
        batch.targets,
        lengths,
        batch.target_lengths,
        zero_infinity=True,
        ctc_weight=settings.ctc_weight * batch.labelled_share,
        kd_weight=settings.kd_weight
        * SCHEDULES[settings.kd_schedule](progress)
        * batch.frames_share,
        temperature=settings.temperature,
        divergence=settings.divergence,
        labelled=batch.labelled,
        frame_weight=batch.frame_weight,
        batch_first=True,
    ).loss


def masked_prediction(logits: Tensor, lengths: Tensor, batch: Batch, progress: float) -> Tensor:
    """Cross-entropy of the codes of hidden frames; `targets` [N, T], -1 where nothing is hidden."""
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=-1, reduction="sum"
    )
    return loss / lengths.sum() * batch.frames_share


def frame_weight(logits: Tensor, settings: Settings) -> Tensor:
    """Teacher logits [T, C] -> weight of each frame, float32 [T]; see --frames."""
    spoken = logits.argmax(-1) != 0
    if settings.frames == "all":
        spoken = torch.ones_like(spoken)
    elif settings.frames == "threshold":
        spoken = logits.float().softmax(-1)[:, 0] < settings.blank_threshold
    elif settings.frames == "neighbours" and len(spoken):
        spoken = F.max_pool1d(spoken.float()[None], 3, stride=1, padding=1)[0] > 0
    return spoken.float()


def confidence(logits: Tensor) -> float:
    """Mean probability of the best class over the frames where it is not blank; 0 without any."""
    best, classes = logits.float().softmax(-1).max(-1)
    return float(best[classes != 0].mean()) if (classes != 0).any() else 0.0


def delay(logits: Tensor, weights: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Delay teacher logits [T, C] and their weights [T] by `frames`; the first ones have weight 0.

    The last `frames` of the teacher have no frame of the student left.
    """
    if not frames:
        return logits, weights
    kept = max(0, len(logits) - frames)
    late = torch.cat([torch.zeros_like(logits[kept:]), logits[:kept]])
    return late, torch.cat([torch.zeros_like(weights[kept:]), weights[:kept]])
