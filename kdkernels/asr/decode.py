"""Greedy CTC decoding; word and character error rates with bootstrap intervals."""

from typing import NamedTuple

import jiwer
import numpy as np
import torch
from torch import Tensor

from .data import Alphabet


def greedy(logits: Tensor, lengths: Tensor, alphabet: Alphabet) -> list[str]:
    """[N, T, C] logits -> the text of the best path of each."""
    paths = zip(logits.argmax(-1).cpu(), lengths.tolist(), strict=True)
    return [_text(path[:length], alphabet) for path, length in paths]


def greedy_one(logits: Tensor, alphabet: Alphabet) -> str:
    """[T, C] logits -> the text of the best path."""
    return _text(logits.argmax(-1).cpu(), alphabet)


def _text(path: Tensor, alphabet: Alphabet) -> str:
    """A CTC path, its repeats merged and its blanks (class 0) dropped."""
    labels = torch.unique_consecutive(path)
    return alphabet.decode(labels[labels != 0].tolist())


class Errors(NamedTuple):
    """Edit errors and reference sizes, each [N]."""

    errors: np.ndarray
    sizes: np.ndarray

    def percent(self) -> float:
        return 100 * float(self.errors.sum() / self.sizes.sum())


def word_errors(references: list[str], hypotheses: list[str]) -> Errors:
    return _errors(jiwer.process_words(references, hypotheses))


def character_errors(references: list[str], hypotheses: list[str]) -> Errors:
    return _errors(jiwer.process_characters(references, hypotheses))


def _errors(output) -> Errors:
    def edits(chunk) -> int:
        sizes = (chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        return 0 if chunk.type == "equal" else max(sizes)

    errors = [sum(map(edits, chunks)) for chunks in output.alignments]
    return Errors(np.array(errors), np.array([len(words) for words in output.references]))


def resamples(count: int, seed: int, draws: int = 1000) -> np.ndarray:
    """[draws, count] utterances drawn with replacement: the same ones for systems compared."""
    return np.random.default_rng(seed).integers(0, count, (draws, count))


def interval(errors: Errors, drawn: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the error rate, in percent."""
    rates = 100 * errors.errors[drawn].sum(1) / errors.sizes[drawn].sum(1)
    return np.percentile(rates, [2.5, 97.5]).tolist()


def difference_interval(a: Errors, b: Errors, drawn: np.ndarray) -> list[float]:
    """95 % bootstrap interval, in points, of the rate of `a` less that of `b`, same utterances."""
    rates = (100 * e.errors[drawn].sum(1) / e.sizes[drawn].sum(1) for e in (a, b))
    return np.percentile(next(rates) - next(rates), [2.5, 97.5]).tolist()


def reduction_interval(new: Errors, old: Errors, drawn: np.ndarray) -> list[float]:
    """95 % bootstrap interval, in percent, of 1 - new / old over the same utterances."""
    ratio = new.errors[drawn].sum(1) / np.maximum(old.errors[drawn].sum(1), 1)
    return np.percentile(100 * (1 - ratio), [2.5, 97.5]).tolist()
