"""Batches: the same ones for the same seed, of the same seconds of audio."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data import Alphabet, Dataset
from .features import FRAMES_PER_SECOND
from .model import STACK


def unalignable(text: str, features: Tensor) -> bool:
    """Whether `features` [frames, MELS] are too short for any CTC path that spells `text`."""
    repeats = sum(a == b for a, b in pairwise(text))  # a blank must part them
    return len(features) // STACK < len(text) + repeats


class Batch(NamedTuple):
    features: Tensor  # float32 [N, frames, MELS], zero padded
    lengths: Tensor  # int64 [N], in feature frames
    targets: Tensor  # int64 [N, S]
    target_lengths: Tensor  # int64 [N]; 0 without a transcript
    labelled: Tensor  # bool [N]
    teacher_logits: Tensor | None  # [N, T, C], zero padded

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if x is None else x.to(device) for x in self))


class Pool(NamedTuple):
    """Utterances that batches are drawn from, with transcripts or without."""

    data: Dataset
    alphabet: Alphabet | None  # None: no transcripts
    logits: list[Tensor] | None = None  # the teacher's, float16 [T, C] each

    def target(self, index: int) -> Tensor:
        """[S] classes; none without transcripts."""
        text = self.data.texts[index] if self.alphabet else ""
        return (self.alphabet or Alphabet("")).encode(text)


def schedule(lengths: list[int], seed: int, seconds: float, steps: int) -> list[list[int]]:
    """The utterances of each of `steps` batches, of at most `seconds` of audio with padding.

    Every epoch is a permutation, cut into pieces whose utterances are sorted by length, so that
    little is padding. A function of its arguments: a training that goes on draws the same.
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


def collate(chosen: list[tuple[Pool, int]]) -> Batch:
    """Utterances of one or several pools, padded to the longest."""
    rows = [pool.data.features[i].float() for pool, i in chosen]
    targets = [pool.target(i) for pool, i in chosen]
    logits = [pool.logits[i] for pool, i in chosen if pool.logits]
    return Batch(
        pad_sequence(rows, batch_first=True),
        torch.tensor([len(row) for row in rows]),
        pad_sequence(targets, batch_first=True),
        torch.tensor([len(target) for target in targets]),
        torch.tensor([pool.alphabet is not None for pool, _ in chosen]),
        pad_sequence(logits, batch_first=True) if logits else None,
    )


def batches(
    parts: list[tuple[Pool, float]], seed: int, seconds: float, steps: int
) -> Callable[[int], Batch]:
    """step -> Batch, each part (pool, share) bringing its share of the `seconds` of audio."""
    schedules = [
        schedule([len(f) for f in pool.data.features], seed, share * seconds, steps)
        for pool, share in parts
    ]
    return lambda step: collate(
        [(pool, i) for (pool, _), plan in zip(parts, schedules, strict=True) for i in plan[step]]
    )
