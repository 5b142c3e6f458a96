"""One loop for teacher and students; evaluation on the way."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import decode, features
from .batches import Batch
from .data import Alphabet, Corpora, Dataset
from .files import TrainError
from .model import Encoder
from .settings import Settings


class Machine(NamedTuple):
    """Where the encoders run, and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype  # bfloat16 (autocast) or float32

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)


def machine(settings: Settings) -> Machine:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainError(f"--device {name} cannot be used: {reason}") from error
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and fast)
    return Machine(device, torch.bfloat16 if bf16 else torch.float32)


class Point(NamedTuple):
    """One point of a dev curve."""

    step: int
    seconds: float  # of training, evaluation not counted
    wer: float


def transcribe(model: Encoder, data: Dataset, alphabet: Alphabet, on: Machine) -> list[str]:
    """The greedy transcript of every utterance, in order."""
    texts = [""] * len(data)
    for chosen, logits, lengths in run(model, data, on):
        for i, text in zip(chosen, decode.greedy(logits, lengths, alphabet), strict=True):
            texts[i] = text
    return texts


@torch.no_grad()
def run(model: Encoder, data: Dataset, on: Machine, batch_size: int = 32):
    """Yields (indices, logits [N, T, C], lengths [N]) over utterances sorted by length."""
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data.features[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [data.features[i].float() for i in chosen]
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with on.autocast():
            yield chosen, *model(padded.to(on.device), lengths.to(on.device))


def fit(
    model: Encoder,
    batch_at: Callable[[int], Batch],
    loss_of: Callable[[Tensor, Tensor, Batch], Tensor],
    steps: int,
    corpora: Corpora,
    settings: Settings,
    on: Machine,
    bar,
) -> list[Point]:
    """Train `model` in place; `loss_of(logits, lengths, batch)`. Returns the dev curve."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        decay = (step - warm_up) / max(1, steps - warm_up)
        return (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * decay)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator()
    curve: list[Point] = []
    seconds = 0.0
    for step in range(steps):
        start = time.perf_counter()
        model.train()
        batch = batch_at(step)
        generator.manual_seed(settings.seed * 1_000_003 + step)
        hidden = features.spec_augment(batch.features, generator)
        batch = batch._replace(features=hidden).to(on.device)
        with on.autocast():
            logits, lengths = model(batch.features, batch.lengths)
        loss_of(logits, lengths, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seconds += time.perf_counter() - start
        if (step + 1) % settings.eval_every == 0 or step + 1 == steps:
            texts = transcribe(model, corpora.dev, corpora.alphabet, on)
            errors = decode.word_errors(corpora.dev.texts, texts)
            curve.append(Point(step + 1, seconds, errors.percent()))
            bar.set_postfix_str(f"dev WER {errors.percent():.1f}")
        bar.update()
    return curve
