"""One loop for every training, which resumes where it was and evaluates on the way.

All randomness is a function of the step, so a checkpoint is model, optimizer and step, and a
training that was killed ends with the same bits as one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import decode, files, processes
from .batches import Batch
from .data import Alphabet, Dataset
from .extras import missing
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
    """One point of a curve."""

    step: int
    seconds: float  # of training, evaluation not counted
    wer: float  # on dev, percent; of the self-supervised stage, hidden frames guessed wrong
    loss: float  # mean over the steps since the point before


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


class Checkpoints:
    """OUT/checkpoints/NAME: the newest ones and the best, each written whole or not at all."""

    def __init__(self, folder: Path, key: str, keep: int, about: dict):
        """`about`: the encoder's shape and alphabet, which make the best one a file of a model."""
        self.folder, self.key, self.keep, self.about = folder, key, keep, about

    def save(self, model: Encoder, optimizer, facts: dict) -> None:
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        for i, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": value for name, value in values.items()}
        name = f"step-{facts['step']:08}.safetensors"
        files.save_tensors(self.folder / name, state, self.key, **facts)
        # those of a later step were unreadable, or this training would have begun there
        whole = sorted(p for p in self.folder.glob("step-*.safetensors") if p.name <= name)
        for path in set(self.folder.glob("step-*.safetensors")) - set(whole[-self.keep :]):
            path.unlink()

    def save_best(self, model: Encoder, facts: dict) -> None:
        path = self.folder / "best.safetensors"
        files.save_tensors(path, model.state_dict(), self.key, **self.about, **facts)

    def load(self, model: Encoder, optimizer) -> dict | None:
        """The facts of the newest checkpoint that is whole; None without one."""
        paths = sorted(self.folder.glob("step-*.safetensors"), reverse=True)
        for path in paths:
            before = "the checkpoint before it is used"
            otherwise = "the training begins anew" if path == paths[-1] else before
            found = files.load_tensors(path, self.key, otherwise)
            if found is None:
                continue
            state: dict[int, dict[str, Tensor]] = {}
            weights = {}
            for name, value in found[0].items():
                kind, _, rest = name.partition(".")
                if kind == "model":
                    weights[rest] = value
                else:
                    i, _, rest = rest.partition(".")
                    state.setdefault(int(i), {})[rest] = value
            model.load_state_dict(weights)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            return found[1]
        return None


def fit(
    model: Encoder,
    sampler: Callable[[int], list[Batch]],
    loss_of: Callable[[Tensor, Tensor, Batch, float], Tensor],
    augment: Callable[[Batch, int], Batch],
    score: Callable[[Encoder], float],
    steps: int,
    settings: Settings,
    on: Machine,
    checkpoints: Checkpoints,
    metrics: "Metrics",
    bar,
) -> list[Point]:
    """Train `model` in place, from its newest checkpoint. Returns the curve.

    `sampler(step)` gives the pieces of a step, `augment(batch, step)` hides some of its input,
    `loss_of(logits, lengths, batch, progress)` is minimised, `score(model)` evaluates.
    """
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        decay = (step - warm_up) / max(1, steps - warm_up)
        return (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * decay)

    facts = checkpoints.load(model, optimizer) or {"step": 0, "seconds": 0.0, "sum": 0.0}
    curve = [Point(*point) for point in facts.get("curve", [])]
    first, seconds, total = facts["step"], facts["seconds"], facts["sum"]
    several = processes.world() > 1
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if several else model
    leads = processes.rank() == 0
    if leads:
        metrics.write(curve)
    bar.update(first)
    for step in range(first, steps):
        start = time.perf_counter()
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step)
        pieces, loss_here = sampler(step), 0.0
        for number, batch in enumerate(pieces, 1):
            batch = augment(batch, step).to(on.device)
            wait = several and number < len(pieces)
            with wrapped.no_sync() if wait else nullcontext():
                with on.autocast():
                    logits, lengths = wrapped(batch.features, batch.lengths)
                loss = loss_of(logits, lengths, batch, step / steps)
                loss.backward()
            loss_here += loss.item()
        loss_here = processes.mean(loss_here)
        total += loss_here
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
        if not math.isfinite(loss_here + norm):
            raise TrainError(
                f"{metrics.name}: at step {step + 1} the loss is {loss_here:.3g} and the norm of "
                f"its gradient {norm:.3g}; nothing of this step is kept. Lower --learning-rate "
                f"({settings.learning_rate:g})"
            )
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        done = step + 1
        evaluated = done % settings.eval_every == 0 or done == steps
        if evaluated:
            before = curve[-1].step if curve else 0
            wer = processes.from_first(lambda: score(model))
            curve.append(Point(done, seconds, wer, total / (done - before)))
            total = 0.0
            bar.set_postfix_str(f"dev WER {wer:.1f}")
        if leads and evaluated:
            metrics.write(curve)
        # before the checkpoint: a training resumed from there does not pass here again
        if leads and evaluated and curve[-1].wer == min(point.wer for point in curve):
            checkpoints.save_best(model, {"step": done, "wer": curve[-1].wer})
        if leads and (done % settings.checkpoint_every == 0 or done == steps):
            facts = {"step": done, "seconds": seconds, "sum": total, "curve": curve}
            checkpoints.save(model, optimizer, facts)
        bar.update()
    return curve


class Metrics:
    """OUT/NAME.jsonl, a line for each point of the curve; OUT/tensorboard on request."""

    def __init__(self, out: Path, name: str, key: str, tensorboard: bool):
        self.name, self.path, self.key = name, out / f"{name}.jsonl", key
        self._shown = 0
        self._board = None
        if tensorboard and processes.rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                name = "tensorboard"
                raise TrainError(f"--tensorboard: {missing(name, name)}") from error
            self._board = SummaryWriter(str(out / "tensorboard" / name))

    def write(self, curve: list[Point]) -> None:
        lines = [json.dumps({**point._asdict(), "key": self.key}) + "\n" for point in curve]
        files.write_bytes(self.path, "".join(lines).encode())
        for point in curve[self._shown :] if self._board else ():
            for name in ("wer", "loss"):
                self._board.add_scalar(name, getattr(point, name), point.step)
            self._board.flush()
        self._shown = len(curve)

    def read(self, steps: int) -> list[Point] | None:
        """The curve of a training that ended after `steps`; None unless all of it is there."""
        try:
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            curve = [Point(*(row[name] for name in Point._fields)) for row in rows]
            whole = {row["key"] for row in rows} == {self.key} and curve[-1].step == steps
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None
        return curve if whole else None
