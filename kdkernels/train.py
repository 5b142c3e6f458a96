"""`python -m kdkernels.train`: what a distilled student gains over a student alone, on speech.

    prepare         speech (synthesised, or manifests) -> features           CACHE/features-*
    train_teacher   CTC on every transcript                                  OUT/teacher
    cache_logits    the teacher's logits for what the students will hear     CACHE/logits-*
    train_students  alone; distilled; distilled without any transcript       OUT/student_*
    evaluate        WER and CER on unseen voices and sentences
    measure_loss    milliseconds of the loss: these ops, torch's own
    report          OUT/report.json and OUT/report.md

A stage reads files and writes files. A file that is there, whole, and made from the same data and
settings is used as it is: the same command, run again, goes on where it ended.
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kdkernels as kd

try:
    from tqdm import tqdm

    from kdkernels.asr import batches, data, decode, files, measure, model, report, training
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
    return tqdm(total=total, desc=what, unit=unit, disable=None, ncols=columns, nrows=rows)


def prepare(settings: Settings, cache: Path) -> data.Corpora:
    """Speech -> features on disk -> memory. Manifests are checked whole before the work begins."""
    if settings.transcribed:
        sources = {
            "transcribed": data.recorded(settings.transcribed, transcripts=True),
            "untranscribed": data.recorded(settings.untranscribed, transcripts=False),
            "test": data.recorded(settings.test, transcripts=True),
        }
        if settings.dev:
            sources["dev"] = data.recorded(settings.dev, transcripts=True)
    else:
        sources = {
            split: data.synthesised(settings.seed, split, getattr(settings, f"{split}_utterances"))
            for split in ("transcribed", "untranscribed", "dev", "test")
        }
    total = sum(len(shard) for shards in sources.values() for shard in shards)
    with progress(total, "speech and features", "utt") as bar:
        sets = {
            split: data.load(shards, cache, settings.workers, bar.update)
            for split, shards in sources.items()
        }
    if "dev" not in sets:
        sets["transcribed"], sets["dev"] = data.split_off_dev(sets["transcribed"])
    transcribed = sets["transcribed"]
    unheard = sum(map(batches.unalignable, transcribed.texts, transcribed.features))
    if unheard:
        print(
            f"warning: {unheard} of {len(transcribed)} transcripts are longer than their audio can "
            "hold and teach nothing; do audio and text belong together?",
            file=sys.stderr,
        )
    student = transcribed.part(0, settings.student_transcripts)
    return data.Corpora(**sets, student=student, alphabet=data.Alphabet.of(transcribed.texts))


def train(
    experiment: Experiment,
    name: str,
    parts: list[tuple[batches.Pool, float]],
    loss_of: Callable[[Tensor, Tensor, batches.Batch], Tensor],
    made_from: list,
) -> Trained:
    """OUT/NAME.safetensors: trained on `parts`, unless it is there, made from the same things.

    `made_from`: what the loss depends on besides the parts.
    """
    settings, out, _, on, corpora = experiment
    role = name.split("_")[0]
    width, layers, steps = (getattr(settings, f"{role}_{x}") for x in ("width", "layers", "steps"))
    torch.manual_seed(settings.seed)
    encoder = model.Encoder(width, layers, len(corpora.alphabet)).to(on.device)
    facts = {
        "shape": encoder.shape,
        "frames_per_second": encoder.frames_per_second,
        "alphabet": corpora.alphabet.characters,
    }
    shared = ("seed", "batch_seconds", "learning_rate", "eval_every")
    heard = [(pool.data.key, pool.alphabet is not None, share) for pool, share in parts]
    recipe = [name, steps, [getattr(settings, s) for s in shared], str(on.dtype), kd.__version__]
    key = files.digest(facts, recipe, heard, made_from, corpora.dev.key)

    path = out / f"{name}.safetensors"
    found = files.load_tensors(path, key)
    if found:
        encoder.load_state_dict(found[0])
        curve = [training.Point(*point) for point in found[1]["curve"]]
    else:
        batch_at = batches.batches(parts, settings.seed, settings.batch_seconds, steps)
        with progress(steps, name.replace("_", " "), "step") as bar:
            curve = training.fit(encoder, batch_at, loss_of, steps, corpora, settings, on, bar)
        files.save_tensors(path, encoder.state_dict(), key, curve=curve, **facts)
    print(
        f"{name}: {encoder.parameter_count():,} parameters, {steps} steps in "
        f"{curve[-1].seconds:.0f} s, dev WER {curve[-1].wer:.1f} %{' (on disk)' if found else ''}",
        flush=True,
    )
    return Trained(encoder, curve, files.tensors_digest(encoder.state_dict()))


def ctc(logits: Tensor, lengths: Tensor, batch: batches.Batch) -> Tensor:
    """CTC of a batch whose utterances all have transcripts."""
    return kd.ctc_loss(
        logits, batch.targets, lengths, batch.target_lengths, zero_infinity=True, batch_first=True
    )


def train_teacher(experiment: Experiment) -> Trained:
    corpora = experiment.corpora
    parts = [(batches.Pool(corpora.transcribed, corpora.alphabet), 1.0)]
    return train(experiment, "teacher", parts, ctc, [])


def cache_logits(experiment: Experiment, teacher: Trained, dataset: data.Dataset) -> list[Tensor]:
    """The teacher's logits, float16 [T, C] for each utterance, from disk when they are there."""
    rate = teacher.encoder.frames_per_second
    key = files.digest("logits", teacher.sha256, dataset.key, rate)
    path = experiment.cache / f"logits-{key[:16]}.safetensors"
    found = files.load_tensors(path, key)
    if not found:
        rows: list[Tensor] = [torch.empty(0)] * len(dataset)
        with progress(len(dataset), "teacher logits", "utt") as bar:
            for chosen, logits, lengths in training.run(teacher.encoder, dataset, experiment.on):
                for i, row, length in zip(chosen, logits.cpu(), lengths.tolist(), strict=True):
                    rows[i] = row[:length].half()
                bar.update(len(chosen))
        tensors = {"logits": torch.cat(rows), "lengths": torch.tensor([len(r) for r in rows])}
        files.save_tensors(path, tensors, key, frames_per_second=rate)
        found = tensors, {}
    return list(found[0]["logits"].split(found[0]["lengths"].tolist()))


def train_students(
    experiment: Experiment, teacher: Trained
) -> tuple[dict[str, Trained], list[tuple[batches.Pool, float]]]:
    """Same seed, steps and audio in a step. Also returns what the distilled student heard."""
    settings, corpora = experiment.settings, experiment.corpora

    def distil(logits: Tensor, lengths: Tensor, batch: batches.Batch) -> Tensor:
        return measure.fused(logits, lengths, batch, settings)

    alone = batches.Pool(corpora.student, corpora.alphabet)
    known = alone._replace(logits=cache_logits(experiment, teacher, corpora.student))
    logits = cache_logits(experiment, teacher, corpora.untranscribed)
    unknown = batches.Pool(corpora.untranscribed, None, logits)
    share = settings.untranscribed_share
    mixed = [(known, 1 - share), (unknown, share)]
    silent = [(known._replace(alphabet=None), 1 - share), (unknown, share)]
    recipe = [teacher.sha256, settings.ctc_weight, settings.kd_weight, settings.temperature]
    arms = {
        "student_alone": ([(alone, 1.0)], ctc, []),
        "student_distilled": (mixed, distil, recipe),
        "student_distilled_without_transcripts": (silent, distil, recipe),
    }
    return {name: train(experiment, name, *arm) for name, arm in arms.items()}, mixed


def evaluate(experiment: Experiment, trained: Trained) -> report.Score:
    """Greedy transcripts of the test set against the references."""
    corpora = experiment.corpora
    start = time.perf_counter()
    texts = training.transcribe(trained.encoder, corpora.test, corpora.alphabet, experiment.on)
    seconds = time.perf_counter() - start
    return report.Score(
        decode.word_errors(corpora.test.texts, texts),
        decode.character_errors(corpora.test.texts, texts),
        seconds / corpora.test.seconds,
    )


def measure_loss(
    experiment: Experiment, student: Trained, parts: list[tuple[batches.Pool, float]]
) -> dict[str, float]:
    """The loss of the distilled student's first batch, timed; see `measure.compare`."""
    settings, on = experiment.settings, experiment.on
    batch = batches.batches(parts, settings.seed, settings.batch_seconds, 1)(0).to(on.device)
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
    on = training.machine(settings)
    corpora = prepare(settings, cache)
    prepared = time.perf_counter() - start
    experiment = Experiment(settings, out, cache, on, corpora)
    teacher = train_teacher(experiment)
    students, heard = train_students(experiment, teacher)
    models = {"teacher": teacher, **students}
    results = report.make(
        settings,
        corpora,
        {name: (trained.encoder, trained.curve) for name, trained in models.items()},
        {name: evaluate(experiment, trained) for name, trained in models.items()},
        measure_loss(experiment, students["student_distilled"], heard),
        {"precision": str(on.dtype), "device": str(on.device), "threads": torch.get_num_threads()},
        {"speech and features": prepared, "total": time.perf_counter() - start},
    )
    report.write(results, out)
    return results


def main(arguments: list[str] | None = None) -> int:
    settings = parse(arguments)
    try:
        results = run(settings)
    except files.TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished stages are kept: run the same command again", file=sys.stderr)
        return 130
    print(report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
