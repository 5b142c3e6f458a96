"""The self-supervised stage: BEST-RQ (Chiu et al. 2022), masked prediction of random codes.

A random projection and a random codebook, never trained, turn each stacked frame into a code; spans
of the input are replaced by noise, and the encoder predicts the codes of what it does not see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch
from .features import MELS
from .model import STACK

CODES, DIMENSION = 512, 16
# The chance that a span begins at a frame of logits, and its length in such frames: 90 ms, about
# one speech sound. With spans of 240 ms, too hard to guess, the encoder learned little but code
# frequencies.
START, SPAN = 0.1, 3


class Quantiser:
    """Stacked features -> codes; a function of the seed."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        size = STACK * MELS
        self._projection = torch.randn(size, DIMENSION, generator=generator) / size**0.5
        codebook = torch.randn(CODES, DIMENSION, generator=generator)
        self._codebook = F.normalize(codebook, dim=-1)

    def __call__(self, stacked: Tensor) -> Tensor:
        """[..., STACK * MELS] -> codes [...], those of the nearest directions."""
        return (F.normalize(stacked @ self._projection, dim=-1) @ self._codebook.T).argmax(-1)


def mask(batch: Batch, quantiser: Quantiser, seed: int) -> Batch:
    """Replace spans of features by noise; targets [N, T] are the codes there, -1 elsewhere.

    What is hidden depends on the seed and on an utterance's position in the step alone.
    """
    features = batch.features.clone()
    N, frames, _ = features.shape
    T = frames // STACK
    stacked = features[:, : T * STACK].view(N, T, STACK * MELS)  # a view of `features`
    codes = quantiser(stacked)
    targets = torch.full((N, T), -1)
    for n in range(N):
        length = int(batch.lengths[n]) // STACK
        generator = torch.Generator().manual_seed(seed + int(batch.ids[n]))
        begins = (torch.rand(length, generator=generator) < START).float()
        hidden = F.max_pool1d(F.pad(begins, (SPAN - 1, 0))[None], SPAN, stride=1)[0] > 0
        noise = 0.1 * torch.randn(length, STACK * MELS, generator=generator)
        targets[n, :length] = torch.where(hidden, codes[n, :length], -1)
        stacked[n, :length] = torch.where(hidden[:, None], noise, stacked[n, :length])
    return batch._replace(features=features, targets=targets)
