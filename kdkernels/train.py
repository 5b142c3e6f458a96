"""`python -m kdkernels.train`: what a distilled student gains over a student alone, on speech.

    prepare         speech (synthesised, or your own) -> features            CACHE/features-*
    self_supervise  BEST-RQ on untranscribed audio, when --ssl-steps          OUT/ssl
    train_teacher   CTC on every transcript, unless --teachers says otherwise OUT/teacher
    cache_logits    the teachers' logits for what the students will hear     CACHE/logits-*
    train_student   one arm of the table in asr/arms.py                      OUT/student_*
    evaluate        WER and CER on unseen voices and sentences
    measure_loss    milliseconds and memory of the loss: these ops, torch's own
    report          OUT/report.json, OUT/report.md, OUT/*.png

A stage reads files and writes files. A file that is there, whole, and made from the same data and
settings is used as it is; a training goes on from its newest checkpoint. So the same command, run
again, goes on where it was.
"""

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import kdkernels as kd

try:
    from tqdm import tqdm

    from kdkernels.asr import (
        arms,
        batches,
        bestrq,
        data,
        decode,
        features,
        files,
        losses,
        measure,
        model,
        processes,
        report,
        sources,
        teachers,
        training,
    )
    from kdkernels.asr import (
        settings as settings_module,
    )
    from kdkernels.asr.arms import ARMS, TEACHERS, Arm
    from kdkernels.asr.settings import Settings, parse
except ModuleNotFoundError as error:
    if (error.name or "kdkernels").startswith("kdkernels"):
        raise
    print(
        f'error: {error.name} is missing: pip install "kdkernels[train]", '
        'or pip install -e ".[train]" in a checkout',
        file=sys.stderr,
    )
    sys.exit(2)


class Experiment(NamedTuple):
    """What every stage reads."""

    settings: Settings
    out: Path
    cache: Path
    on: training.Machine
    corpora: data.Corpora


class Trained(NamedTuple):
    encoder: model.Encoder
    curve: list[training.Point]
    sha256: str  # of the weights


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar on a terminal, silent elsewhere."""
    columns, rows = shutil.get_terminal_size()  # 80, 24 where a terminal does not know its size
    silent = None if processes.rank() == 0 else True
    return tqdm(total=total, desc=what, unit=unit, disable=silent, ncols=columns, nrows=rows)


def say(text: str) -> None:
    if processes.rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    if processes.rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


# ---- data ----------------------------------------------------------------------------------------


def prepare(settings: Settings, cache: Path, more_characters: str) -> data.Corpora:
    """Speech -> features on disk -> memory. Manifests are checked whole before the work begins."""
    shards, skipped = {}, {}
    if settings.transcribed:
        for split in ("transcribed", "untranscribed", "test", "dev"):
            if spec := getattr(settings, split):
                said = split != "untranscribed"
                shards[split], skipped[split] = sources.read(spec, said, settings.skip_bad)
    else:
        for split in ("transcribed", "untranscribed", "dev", "test"):
            count = getattr(settings, f"{split}_utterances")
            shards[split] = data.synthesised(settings.seed, split, count)
    if any("noisy" in ARMS[name].hears for name in settings.arms):
        for clean, noisy in (("untranscribed", "noisy"), ("test", "noisy_test")):
            snr, seed = settings.noise_snr, settings.seed
            shards[noisy] = [data.Noisy(source, snr, seed) for source in shards[clean]]
    total = sum(len(shard) for several in shards.values() for shard in several)
    with progress(total, "speech and features", "utt") as bar:
        sets = {
            split: data.load(several, cache, settings.workers, bar.update)
            for split, several in shards.items()
        }
    if "dev" not in sets:
        sets["transcribed"], sets["dev"] = data.split_off_dev(sets["transcribed"])
    transcribed = sets["transcribed"]
    unheard = sum(map(batches.unalignable, transcribed.texts, transcribed.features))
    if unheard:
        warn(
            f"{unheard} of {len(transcribed)} transcripts are longer than their audio can "
            "hold and teach nothing; do audio and text belong together?"
        )
    student = transcribed.part(0, settings.student_transcripts)
    alphabet = data.Alphabet.of([*transcribed.texts, more_characters])
    return data.Corpora(**sets, student=student, alphabet=alphabet, skipped=skipped)


# ---- training ------------------------------------------------------------------------------------


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
    """OUT/NAME.safetensors: trained on `parts`, unless it is there, made from the same things.

    `shape`: of the encoder. `made_from`: what the loss depends on besides the parts. `start`: whose
    weights it begins with, those that fit. `augment`, `score`: see `training.fit`; SpecAugment and
    the WER on dev unless given.
    """
    settings, out, _, on, corpora = experiment
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
        checkpoints = training.Checkpoints(out / "checkpoints" / name, key, settings.keep)
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
    """BEST-RQ on the untranscribed audio; its error is that of hidden frames of dev."""
    settings, corpora, on = experiment.settings, experiment.corpora, experiment.on
    if not settings.ssl_steps:
        return None
    quantiser = bestrq.Quantiser(settings.seed)

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
        experiment,
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
    """The teachers' logits, float16 [T, C] for each utterance, from disk when they are there."""
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
            rows = [(row[None], torch.tensor([len(row)])) for row in logits]
            texts = [decode.greedy(*row, corpora.alphabet)[0] for row in rows]
            said = [i for i in pool.allowed or range(len(texts)) if texts[i]]
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
        shape += [settings.chunk_frames, settings.left_chunks]
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
    return train(
        experiment,
        f"student_{name}",
        shape,
        parts,
        loss_of,
        settings.student_steps,
        made_from,
        start=start,
    )


# ---- what came of it -----------------------------------------------------------------------------


def evaluate(experiment: Experiment, trained: Trained, test: data.Dataset) -> report.Score:
    """Greedy transcripts of a test set against the references."""
    start = time.perf_counter()
    texts = training.transcribe(trained.encoder, test, experiment.corpora.alphabet, experiment.on)
    return _score(test, texts, time.perf_counter() - start)


def evaluate_teachers(experiment: Experiment, opened: Opened) -> report.Score:
    """The same for the mixture of teachers."""
    test, alphabet = experiment.corpora.test, experiment.corpora.alphabet
    start = time.perf_counter()
    rows = [(r[None], torch.tensor([len(r)])) for r in cache_logits(experiment, opened, test)]
    texts = [decode.greedy(*row, alphabet)[0] for row in rows]
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


def run(settings: Settings) -> dict:
    """Every stage in order; returns the report."""
    start = time.perf_counter()
    out = Path(settings.out)
    cache = Path(settings.cache) if settings.cache else out / "cache"
    for folder in (out, cache):
        files.check_writable(folder)
        files.remove_unfinished(folder)
    if processes.rank() == 0:
        settings_module.save(settings, out / "settings.yaml")
        for text in settings_module.warnings(settings):
            warn(text)
    on = training.machine(settings)
    opened = teachers.open_teachers(settings.teachers)
    with processes.first_then_others():
        corpora = prepare(settings, cache, teachers.characters(opened))
    prepared = time.perf_counter() - start
    experiment = Experiment(settings, out, cache, on, corpora)

    models: dict[str, Trained] = {}
    ssl = self_supervise(experiment)
    if any(teacher is None for teacher, _ in opened):
        models["teacher"] = train_teacher(experiment, "teacher", arms.OWN, ssl)
        own = teachers.Own(models["teacher"].encoder, corpora.alphabet.characters)
        opened = [(teacher or own, weight) for teacher, weight in opened]
    for name in settings.teacher_rows:
        models[f"teacher_{name}"] = train_teacher(
            experiment, f"teacher_{name}", TEACHERS[name], ssl
        )
    for name in (name for name in ARMS if name in settings.arms):
        models[f"student_{name}"] = train_student(experiment, name, opened, models)

    scores = {name: evaluate(experiment, x, corpora.test) for name, x in models.items()}
    if "teacher" not in models or len(opened) > 1:
        scores["teacher"] = evaluate_teachers(experiment, opened)
    noisy = {}
    if corpora.noisy_test:
        chosen = ("student_distilled", "student_noisy")
        noisy = {n: evaluate(experiment, models[n], corpora.noisy_test) for n in chosen}
    results = report.make(
        settings,
        corpora,
        {name: x.curve for name, x in [*models.items(), *([("ssl", ssl)] if ssl else [])]},
        {
            "teacher": sum(teacher.parameters for teacher, _ in opened),
            **{n: x.encoder.parameter_count() for n, x in models.items() if n != "teacher"},
        },
        scores,
        noisy,
        measure_loss(experiment, models["student_distilled"], opened),
        {"precision": str(on.dtype), "device": str(on.device), "threads": torch.get_num_threads()},
        {"speech and features": prepared, "total": time.perf_counter() - start},
    )
    if processes.rank() == 0:
        report.write(results, out)
    return results


def run_seeds(settings: Settings) -> dict:
    """The experiment once, or once for each of several seeds and a report over all of them."""
    if settings.seeds == 1:
        return run(settings)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    results = [run(settings_module.with_seed(settings, seed)) for seed in seeds]
    together = report.over_seeds(results)
    if processes.rank() == 0:
        report.write(together, Path(settings.out))
    return together


def main(arguments: list[str] | None = None) -> int:
    settings = parse(arguments)
    try:
        with processes.group():
            results = run_seeds(settings)
            say(report.markdown(results))
    except files.TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: run the same command again and it goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
