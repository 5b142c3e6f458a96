"""The results of training: error rates on the test set, and the cost of the loss."""

import time

import torch

from . import batches, data, decode, measure, report, training
from .arms import ARMS
from .stages import Experiment, Opened, Trained, cache_logits, pools


def evaluate(experiment: Experiment, trained: Trained, test: data.Dataset) -> report.Score:
    """Greedy transcripts of a test set against the references."""
    start = time.perf_counter()
    texts = training.transcribe(trained.encoder, test, experiment.corpora.alphabet, experiment.on)
    return _score(test, texts, time.perf_counter() - start)


def evaluate_teachers(experiment: Experiment, opened: Opened) -> report.Score:
    """The same for the mixture of teachers."""
    test, alphabet = experiment.corpora.test, experiment.corpora.alphabet
    start = time.perf_counter()
    texts = [decode.greedy_one(row, alphabet) for row in cache_logits(experiment, opened, test)]
    return _score(test, texts, time.perf_counter() - start)


def _score(test: data.Dataset, texts: list[str], seconds: float) -> report.Score:
    return report.Score(
        decode.word_errors(test.texts, texts),
        decode.character_errors(test.texts, texts),
        seconds / test.seconds,
    )


def measure_loss(experiment: Experiment, student: Trained, opened: Opened) -> dict[str, float]:
    """The loss of the distilled student's first batch, timed; see `measure.compare`."""
    settings, on = experiment.settings, experiment.on
    parts = pools(experiment, ARMS["distilled"], opened)
    batch = batches.Sampler(parts, settings.seed, settings.batch_seconds, 1)(0)[0].to(on.device)
    with torch.no_grad(), on.autocast():
        logits, lengths = student.encoder(batch.features, batch.lengths)
    return measure.compare(logits, lengths, batch, settings)
