"""The stages of the experiment; `kdkernels/train.py` is their order.

Each reads files and writes files, and can be run, resumed and looked at alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import kdkernels as kd

from . import (
    arms,
    batches,
    bestrq,
    data,
    decode,
    features,
    files,
    losses,
    model,
    processes,
    teachers,
    training,
)
from .arms import ARMS, Arm
from .console import progress, say
from .folder import Folder
from .settings import Settings


class Experiment(NamedTuple):
    """What every stage reads."""

    settings: Settings
    out: Folder
    cache: Path
    on: training.Machine
    corpora: data.Corpora


class Trained(NamedTuple):
    encoder: model.Encoder
    curve: list[training.Point]
    sha256: str  # of the weights
    # of each set of which it heard only a part: how many utterances, of how many
    kept: dict[str, list[int]] | None = None


def dev_wer(experiment: Experiment, encoder: model.Encoder) -> float:
    corpora = experiment.corpora
    texts = training.transcribe(encoder, corpora.dev, corpora.alphabet, experiment.on)
    return decode.word_errors(corpora.dev.texts, texts).percent()


def augmented(batch: batches.Batch, step: int, seed: int) -> batches.Batch:
    """SpecAugment, a function of seed, step and position in the step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    hidden = features.spec_augment(batch.features, batch.lengths, generator, batch.ids)
    return batch._replace(features=hidden)


def train(
    experiment: Experiment,
    name: str,
    shape: list[int],
    parts: list[tuple[batches.Pool, float]],
    loss_of: Callable,
    steps: int,
    made_from: list,
    *,
    start: Trained | None = None,
    augment: Callable | None = None,
    score: Callable | None = None,
) -> Trained:
    """OUT/NAME.safetensors: trained on `parts`, unless it exists and was made from the same things.

    `shape`: of the encoder. `made_from`: what the loss depends on besides the parts. `start`: the
    model whose weights it begins with, where they fit. `augment`, `score`: see `training.fit`;
    SpecAugment and the WER on dev unless given.
    """
    settings, folder, _, on, corpora = experiment
    torch.manual_seed(settings.seed)
    encoder = model.Encoder(*shape).to(on.device)
    if start:
        own, other = encoder.state_dict(), start.encoder.state_dict()
        fitting = {n: x for n, x in other.items() if n in own and own[n].shape == x.shape}
        encoder.load_state_dict({**own, **fitting})
    facts = {
        "shape": encoder.shape,
        "frames_per_second": encoder.frames_per_second,
        "alphabet": corpora.alphabet.characters,
    }
    shared = ("seed", "batch_seconds", "learning_rate", "clip", "accumulate", "eval_every")
    heard = [
        [p.data.key, p.data.sha256, p.alphabet is not None, p.allowed, share] for p, share in parts
    ]
    recipe = [name, steps, [getattr(settings, s) for s in shared], str(on.dtype), kd.__version__]
    begun = start.sha256 if start else ""
    key = files.digest(facts, recipe, heard, made_from, corpora.dev.key, begun, processes.world())

    processes.from_first(lambda: folder.claim(name, key))
    out = folder.path
    path = out / f"{name}.safetensors"
    metrics = training.Metrics(out, name, key, settings.tensorboard)
    curve = metrics.read(steps)
    found = files.load_tensors(path, key) if curve else None
    if processes.from_first(lambda: bool(found)):
        encoder.load_state_dict(found[0])
    else:
        sampler = batches.Sampler(
            parts,
            settings.seed,
            settings.batch_seconds,
            steps,
            settings.accumulate,
            processes.rank(),
            processes.world(),
        )
        checkpoints = training.Checkpoints(out / "checkpoints" / name, key, settings.keep, facts)
        augment = augment or partial(augmented, seed=settings.seed)
        score = score or partial(dev_wer, experiment)
        with progress(steps, name.replace("_", " "), "step") as bar:
            curve = training.fit(
                encoder,
                sampler,
                loss_of,
                augment,
                score,
                steps,
                settings,
                on,
                checkpoints,
                metrics,
                bar,
            )
        if processes.rank() == 0:
            files.save_tensors(path, encoder.state_dict(), key, **facts)
    say(
        f"{name}: {encoder.parameter_count():,} parameters, {steps} steps in "
        f"{curve[-1].seconds:.0f} s, {'masked error' if name == 'ssl' else 'dev WER'} "
        f"{curve[-1].wer:.1f} %{' (on disk)' if found else ''}"
    )
    return Trained(encoder, curve, files.tensors_digest(encoder.state_dict()))


def self_supervise(experiment: Experiment) -> Trained | None:
    """BEST-RQ on the untranscribed audio, scored by its errors on hidden frames of dev."""
    settings, corpora, on = experiment.settings, experiment.corpora, experiment.on
    if not settings.ssl_steps:
        return None
    quantiser = bestrq.Quantiser(settings.seed)
    slower = replace(settings, learning_rate=settings.ssl_learning_rate)

    def hide(batch: batches.Batch, step: int) -> batches.Batch:
        return bestrq.mask(batch, quantiser, (settings.seed * 1_000_003 + step) * 4096)

    @torch.no_grad()
    def wrong(encoder: model.Encoder) -> float:
        encoder.eval()
        hidden = missed = 0
        for i in range(len(corpora.dev)):
            batch = batches.collate([(batches.Pool(corpora.dev, None), i)], [0])
            batch = bestrq.mask(batch, quantiser, i).to(on.device)
            with on.autocast():
                logits, _ = encoder(batch.features, batch.lengths)
            at = batch.targets >= 0
            hidden += int(at.sum())
            missed += int((logits.argmax(-1) != batch.targets)[at].sum())
        return 100 * missed / max(1, hidden)

    return train(
        experiment._replace(settings=slower),
        "ssl",
        [settings.teacher_width, settings.teacher_layers, bestrq.CODES],
        [(batches.Pool(corpora.untranscribed, None), 1.0)],
        losses.masked_prediction,
        settings.ssl_steps,
        [bestrq.START, bestrq.SPAN, bestrq.DIMENSION],
        augment=hide,
        score=wrong,
    )


def train_teacher(
    experiment: Experiment, name: str, teacher: arms.Teacher, ssl: Trained | None
) -> Trained:
    settings, corpora = experiment.settings, experiment.corpora
    taught = corpora.transcribed
    if teacher.transcripts:
        taught = taught.part(0, teacher.transcripts)
    shape = [settings.teacher_width, settings.teacher_layers, len(corpora.alphabet)]
    parts = [(batches.Pool(taught, corpora.alphabet), 1.0)]
    start = ssl if teacher.ssl else None
    return train(
        experiment, name, shape, parts, losses.ctc, settings.teacher_steps, [], start=start
    )


Opened = list[tuple[object, float]]  # teachers and their weights


def cache_logits(experiment: Experiment, opened: Opened, dataset: data.Dataset) -> list:
    """The teachers' logits, float16 [T, C] for each utterance, from disk if they are there."""
    settings, _, cache, on, corpora = experiment
    with (
        processes.first_then_others(),
        progress(len(dataset), "teacher logits", "utt") as bar,
    ):
        return teachers.cached(
            opened, dataset, corpora.alphabet, on, cache, settings.top_k, bar.update
        )


def pools(experiment: Experiment, arm: Arm, opened: Opened) -> list[tuple[batches.Pool, float]]:
    """What an arm hears, with the logits, frame weights and transcripts that it learns from."""
    settings, corpora = experiment.settings, experiment.corpora
    share = settings.untranscribed_share
    made = []
    for name, words in arm.hears.items():
        dataset = getattr(corpora, name)
        pool = batches.Pool(dataset, corpora.alphabet if words else None)
        if arm.teacher or words == "teacher":
            # noise is added to what the student hears, never to what the teacher does
            clean = corpora.untranscribed if name == "noisy" else dataset
            logits = cache_logits(experiment, opened, clean)
            if words != "human" and settings.min_confidence:
                sure = [losses.confidence(row) >= settings.min_confidence for row in logits]
                pool = pool._replace(allowed=[i for i, kept in enumerate(sure) if kept])
                if not any(sure):
                    raise files.TrainError(
                        f"the teacher is not sure of any utterance of the {name} set: "
                        "lower --min-confidence"
                    )
        if words == "teacher":
            texts = [decode.greedy_one(row, corpora.alphabet) for row in logits]
            said = [i for i in pool.allowed or range(len(texts)) if texts[i].strip()]
            if not said:
                raise files.TrainError(
                    f"the teacher hears nothing in any utterance of the {name} set: "
                    "raise --teacher-steps, take another with --teachers, or leave out "
                    "pseudo_labels of --arms"
                )
            pool = pool._replace(texts=texts, allowed=said)
        if arm.teacher:
            weights = [losses.frame_weight(row, settings) for row in logits]
            shift = settings.frame_shift if arm.streaming else 0
            rows = [losses.delay(*both, shift) for both in zip(logits, weights, strict=True)]
            logits, weights = map(list, zip(*rows, strict=True))
            if settings.frames == "all" and not shift:
                weights = None
            pool = pool._replace(logits=logits, weights=weights)
        made.append((pool, share if name in ("untranscribed", "noisy") else 1 - share))
    return made if len(made) > 1 else [(made[0][0], 1.0)]


def train_student(
    experiment: Experiment, name: str, opened: Opened, students: dict[str, Trained]
) -> Trained:
    """One arm. Same seed, steps and audio in a step for all."""
    settings, corpora = experiment.settings, experiment.corpora
    arm = ARMS[name]
    if arm.teacher not in ("", "teacher"):  # self-distillation
        encoder = students[f"student_{arm.teacher}"].encoder
        opened = [(teachers.Own(encoder, corpora.alphabet.characters), 1.0)]
    parts = pools(experiment, arm, opened)
    shape = [settings.student_width, settings.student_layers, len(corpora.alphabet)]
    if arm.streaming:
        shift = settings.frame_shift if arm.teacher else 0
        shape += [settings.chunk_frames, settings.left_chunks, shift]
    learned = [[t.sha256, weight] for t, weight in opened]
    if arm.teacher:
        loss_of = partial(losses.distil, settings=settings)
        options = ("ctc_weight", "kd_weight", "kd_schedule", "temperature", "divergence", "frames")
        options += ("blank_threshold", "top_k", "frame_shift")
        made_from = [learned, [getattr(settings, option) for option in options]]
    else:
        loss_of = losses.ctc
        made_from = [learned] if "teacher" in arm.hears.values() else []
    start = students[f"student_{arm.start}"] if arm.start else None
    kept = {
        heard: [len(pool.allowed), len(pool.data)]
        for heard, (pool, _) in zip(arm.hears, parts, strict=True)
        if pool.allowed is not None and len(pool.allowed) < len(pool.data)
    }
    for heard, (some, all_) in kept.items():
        say(
            f"student_{name}: {some} of {all_} {heard} utterances; of the others the teacher is "
            "not sure enough, or it hears nothing in them"
        )
    trained = train(
        experiment,
        f"student_{name}",
        shape,
        parts,
        loss_of,
        settings.student_steps,
        made_from,
        start=start,
    )
    return trained._replace(kept=kept)
