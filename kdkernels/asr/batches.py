"""Batches of equal seconds of audio, a function of the seed."""

import random
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data import Alphabet, Dataset
from .features import FRAMES_PER_SECOND
from .model import STACK


def unalignable(text: str, features: Tensor) -> bool:
    """Whether `features` [frames, MELS] are too short for any CTC path that spells `text`."""
    repeats = sum(a == b for a, b in pairwise(text))  # a blank must separate them
    return len(features) // STACK < len(text) + repeats


class Batch(NamedTuple):
    features: Tensor  # float32 [N, frames, MELS], zero padded
    lengths: Tensor  # int64 [N], in feature frames
    targets: Tensor  # int64 [N, S]
    target_lengths: Tensor  # int64 [N]; 0 without a transcript
    labelled: Tensor  # bool [N]
    teacher_logits: Tensor | None = None  # [N, T, C], zero padded
    frame_weight: Tensor | None = None  # float32 [N, T] of the distillation term
    ids: Tensor | None = None  # int64 [N], position in the whole step
    labelled_share: float = 1.0  # of the step's labelled utterances, times the number of processes
    frames_share: float = 1.0  # of the step's frame weight, times the number of processes

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


class Pool(NamedTuple):
    """Utterances that batches are drawn from, with transcripts or without."""

    data: Dataset
    alphabet: Alphabet | None  # None: no transcripts
    logits: list[Tensor] | None = None  # the teacher's, float16 [T, C] each
    weights: list[Tensor] | None = None  # float32 [T] each, of the frames distilled
    allowed: list[int] | None = None  # the utterances to draw from; None: all
    texts: list[str] | None = None  # transcripts in place of the data's own

    def target(self, index: int) -> Tensor:
        """[S] classes; none without transcripts."""
        text = (self.texts or self.data.texts)[index] if self.alphabet else ""
        return (self.alphabet or Alphabet("")).encode(text)


def schedule(lengths: list[int], seed: int, seconds: float, steps: int) -> list[list[int]]:
    """The utterances of each of `steps` batches, of at most `seconds` of audio with padding.

    Every epoch is a permutation, cut into pieces in which utterances are sorted by length, so that
    there is little padding. A function of its arguments: a resumed training draws the same.
    """
    frames, rng, batches = seconds * FRAMES_PER_SECOND, random.Random(seed), []
    while len(batches) < steps:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch: list[list[int]] = []
        for start in range(0, len(order), 256):
            epoch.append([])
            for index in sorted(order[start : start + 256], key=lengths.__getitem__):
                if epoch[-1] and (len(epoch[-1]) + 1) * lengths[index] > frames:
                    epoch.append([])
                epoch[-1].append(index)
        rng.shuffle(epoch)
        batches += epoch
    return batches[:steps]


# Batches are padded to a multiple of this many feature frames: a convolution is set up anew for
# each shape that it has not seen, and distillation, which joins batches of two pools, had so many
# shapes that this took a third of the training.
ROUND = 10 * STACK


def padded(rows: list[Tensor], length: int) -> Tensor:
    """[n, ...] each -> [N, length, ...], zero padded."""
    whole = pad_sequence(rows, batch_first=True)
    rest = length - whole.shape[1]
    return F.pad(whole, (0, 0) * (whole.dim() - 2) + (0, rest)) if rest > 0 else whole


def collate(chosen: list[tuple[Pool, int]], ids: list[int]) -> Batch:
    """Utterances of one or several pools, padded to the longest or a little more."""
    rows = [pool.data.features[i].float() for pool, i in chosen]
    targets = [pool.target(i) for pool, i in chosen]
    logits = [pool.logits[i] for pool, i in chosen if pool.logits]
    weights = [pool.weights[i] for pool, i in chosen if pool.weights]
    frames = -(-max(map(len, rows)) // ROUND) * ROUND
    return Batch(
        padded(rows, frames),
        torch.tensor([len(row) for row in rows]),
        pad_sequence(targets, batch_first=True),
        torch.tensor([len(target) for target in targets]),
        torch.tensor([pool.alphabet is not None for pool, _ in chosen]),
        padded(logits, frames // STACK) if logits else None,
        padded(weights, frames // STACK) if weights else None,
        torch.tensor(ids),
    )


class Sampler:
    """step -> the part of that step's batch that this process computes, in `accumulate` pieces.

    Each of `parts` (pool, share) brings its share of the `seconds` of audio. A function of its
    arguments: a resumed training draws the same.
    """

    def __init__(
        self,
        parts: list[tuple[Pool, float]],
        seed: int,
        seconds: float,
        steps: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self._pools, self._plans = [pool for pool, _ in parts], []
        for pool, share in parts:
            allowed = pool.allowed or list(range(len(pool.data)))
            lengths = [len(pool.data.features[i]) for i in allowed]
            plan = schedule(lengths, seed, share * seconds, steps)
            self._plans.append([[allowed[i] for i in batch] for batch in plan])

    def __call__(self, step: int) -> list[Batch]:
        chosen = [
            (pool, i)
            for pool, plan in zip(self._pools, self._plans, strict=True)
            for i in plan[step]
        ]
        whole = self._counts(chosen)
        pieces = []
        for piece in range(self.accumulate):
            stride = self.world * self.accumulate
            ids = list(range(self.rank + piece * self.world, len(chosen), stride))
            mine = [chosen[i] for i in ids]
            # a process without an utterance computes one with weight 0
            counts = self._counts(mine) if mine else (0.0, 0.0)
            shares = [self.world * a / b if b else 0.0 for a, b in zip(counts, whole, strict=True)]
            batch = collate(mine or chosen[:1], ids or [0])
            pieces.append(batch._replace(labelled_share=shares[0], frames_share=shares[1]))
        return pieces

    @staticmethod
    def _counts(chosen: list[tuple[Pool, int]]) -> tuple[float, float]:
        """(labelled utterances, weight of the frames, distilled or masked) among `chosen`."""
        labelled = sum(pool.alphabet is not None for pool, _ in chosen)
        frames = sum(
            float(pool.weights[i].sum()) if pool.weights else len(pool.data.features[i]) // STACK
            for pool, i in chosen
        )
        return labelled, frames
