"""`python -m kdkernels.train`: what a distilled student gains over a student alone, on real audio.

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
    print(f'error: {error.name} is missing: pip install "kdkernels[train]"', file=sys.stderr)
    sys.exit(2)


class Trained(NamedTuple):
    encoder: model.Encoder
    curve: list[training.Point]
    sha256: str  # of the weights


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar on a terminal, silent elsewhere."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, dynamic_ncols=True)


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
    everything = sets["transcribed"]
    if "dev" not in sets:
        start = len(everything) - min(150, (len(everything) + 19) // 20)
        sets["dev"] = everything.part(start, len(everything))
        sets["transcribed"] = everything.part(0, start)
    return data.Corpora(
        **sets,
        student=everything.part(0, min(settings.student_transcripts, len(sets["transcribed"]))),
        alphabet=data.Alphabet.of(sets["transcribed"].texts),
    )


def train(
    name: str,
    parts: list[tuple[batches.Pool, float]],
    loss_of: Callable[[Tensor, Tensor, batches.Batch], Tensor],
    made_from: list,
    settings: Settings,
    corpora: data.Corpora,
    on: training.Machine,
) -> Trained:
    """OUT/NAME.safetensors: trained on `parts`, unless it is there, made from the same things."""
    role = name.split("_")[0]
    width, layers, steps = (getattr(settings, f"{role}_{x}") for x in ("width", "layers", "steps"))
    torch.manual_seed(settings.seed)
    encoder = model.Encoder(width, layers, len(corpora.alphabet)).to(on.device)

    shared = ("seed", "batch_seconds", "learning_rate", "eval_every")
    heard = [(pool.data.key, pool.alphabet is not None, share) for pool, share in parts]
    key = files.digest(
        *(name, kd.__version__, width, layers, steps, on.dtype.__str__(), made_from, heard),
        *(corpora.dev.key, corpora.alphabet.characters, [getattr(settings, s) for s in shared]),
    )
    path = Path(settings.out) / f"{name}.safetensors"
    found = files.load_tensors(path, key)
    if found:
        encoder.load_state_dict(found[0])
        curve = [training.Point(*point) for point in found[1]["curve"]]
    else:
        batch_at = batches.batches(parts, settings.seed, settings.batch_seconds, steps)
        with progress(steps, name.replace("_", " "), "step") as bar:
            curve = training.fit(encoder, batch_at, loss_of, steps, corpora, settings, on, bar)
        facts = {"shape": encoder.shape, "frames_per_second": encoder.frames_per_second}
        alphabet = corpora.alphabet.characters
        files.save_tensors(path, encoder.state_dict(), key, curve=curve, alphabet=alphabet, **facts)
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


def train_teacher(settings: Settings, corpora: data.Corpora, on: training.Machine) -> Trained:
    parts = [(batches.Pool(corpora.transcribed, corpora.alphabet), 1.0)]
    return train("teacher", parts, ctc, [], settings, corpora, on)


def cache_logits(
    teacher: Trained, dataset: data.Dataset, cache: Path, on: training.Machine
) -> list[Tensor]:
    """The teacher's logits, float16 [T, C] for each utterance, from disk when they are there."""
    rate = teacher.encoder.frames_per_second
    key = files.digest("logits", teacher.sha256, dataset.key, rate)
    path = cache / f"logits-{key[:16]}.safetensors"
    found = files.load_tensors(path, key)
    if not found:
        rows: list[Tensor] = [torch.empty(0)] * len(dataset)
        with progress(len(dataset), "teacher logits", "utt") as bar:
            for chosen, logits, lengths in training.run(teacher.encoder, dataset, on):
                for i, row, length in zip(chosen, logits.cpu(), lengths.tolist(), strict=True):
                    rows[i] = row[:length].half()
                bar.update(len(chosen))
        tensors = {"logits": torch.cat(rows), "lengths": torch.tensor([len(r) for r in rows])}
        files.save_tensors(path, tensors, key, frames_per_second=rate)
        found = tensors, {}
    return list(found[0]["logits"].split(found[0]["lengths"].tolist()))


def train_students(
    settings: Settings, corpora: data.Corpora, teacher: Trained, cache: Path, on: training.Machine
) -> tuple[dict[str, Trained], list[tuple[batches.Pool, float]]]:
    """Same seed, steps and audio in a step. Also returns what the distilled student heard."""

    def distil(logits: Tensor, lengths: Tensor, batch: batches.Batch) -> Tensor:
        return measure.fused(logits, lengths, batch, settings)

    known, unknown = (
        cache_logits(teacher, dataset, cache, on)
        for dataset in (corpora.student, corpora.untranscribed)
    )
    share = settings.untranscribed_share
    alone = batches.Pool(corpora.student, corpora.alphabet)
    untranscribed = batches.Pool(corpora.untranscribed, None, unknown)
    mixed = [(alone._replace(logits=known), 1 - share), (untranscribed, share)]
    silent = [(pool._replace(alphabet=None), share) for pool, share in mixed]
    weights = [settings.ctc_weight, settings.kd_weight, settings.temperature, teacher.sha256]
    rest = settings, corpora, on
    students = {
        "student_alone": train("student_alone", [(alone, 1.0)], ctc, [], *rest),
        "student_distilled": train("student_distilled", mixed, distil, weights, *rest),
        "student_distilled_without_transcripts": train(
            "student_distilled_without_transcripts", silent, distil, weights, *rest
        ),
    }
    return students, mixed


def evaluate(trained: Trained, corpora: data.Corpora, on: training.Machine) -> report.Score:
    """Greedy transcripts of the test set against the references."""
    start = time.perf_counter()
    texts = training.transcribe(trained.encoder, corpora.test, corpora.alphabet, on)
    seconds = time.perf_counter() - start
    return report.Score(
        decode.word_errors(corpora.test.texts, texts),
        decode.character_errors(corpora.test.texts, texts),
        seconds / corpora.test.seconds,
    )


def measure_loss(
    student: Trained,
    parts: list[tuple[batches.Pool, float]],
    settings: Settings,
    on: training.Machine,
) -> dict[str, float]:
    """The loss of one batch of the distilled student, and that of its first step as a check."""
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
    teacher = train_teacher(settings, corpora, on)
    students, heard = train_students(settings, corpora, teacher, cache, on)
    models = {"teacher": teacher, **students}
    results = report.make(
        settings,
        corpora,
        {name: (trained.encoder, trained.curve) for name, trained in models.items()},
        {name: evaluate(trained, corpora, on) for name, trained in models.items()},
        measure_loss(students["student_distilled"], heard, settings, on),
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
