"""`python -m kdkernels.train`: what a distilled student gains over a student alone, on speech.

    prepare         speech (synthesised, or your own) -> features            CACHE/features-*
    self_supervise  BEST-RQ on untranscribed audio, when --ssl-steps          OUT/ssl
    train_teacher   CTC on every transcript, unless --teachers says otherwise OUT/teacher
    cache_logits    the teachers' logits for what the students will hear     CACHE/logits-*
    train_student   one arm of the table in asr/arms.py                      OUT/student_*
    evaluate        WER and CER on unseen voices and sentences
    measure_loss    milliseconds and memory of the loss: these ops, torch's own
    report          OUT/report.json, OUT/report.md, OUT/*.png
    example         OUT/captions.wav, .vtt, .srt: what the distilled student hears

A stage reads files and writes files. A complete file made from the same data and settings is used
as it is, and a training resumes from its newest checkpoint: the same command, run again, resumes
where it was. What a run with other settings left in OUT is first set aside, in OUT/previous.
"""

import sys
import time
from pathlib import Path

import torch

from kdkernels.asr.extras import needed

with needed():
    from kdkernels.asr import arms, example, files, processes, report, teachers, training
    from kdkernels.asr.arms import ARMS, TEACHERS
    from kdkernels.asr.console import say, warn, write
    from kdkernels.asr.evaluation import evaluate, evaluate_teachers, measure_loss
    from kdkernels.asr.folder import Folder, alone
    from kdkernels.asr.markdown import markdown
    from kdkernels.asr.options import parse
    from kdkernels.asr.prepare import prepare
    from kdkernels.asr.settings import Settings, warnings, with_seed
    from kdkernels.asr.stages import (
        Experiment,
        Trained,
        cache_logits,
        self_supervise,
        train_student,
        train_teacher,
    )


def run(settings: Settings) -> dict:
    """Every stage in order; returns the report."""
    start = time.perf_counter()
    out = Path(settings.out)
    cache = Path(settings.cache) if settings.cache else out / "cache"
    for folder in (out, cache):
        files.check_writable(folder, "--out and --cache")
        if processes.rank() == 0:  # the others would walk a folder that it is setting aside
            files.remove_unfinished(folder)
    for text in warnings(settings):
        warn(text)
    on = training.machine(settings)
    opened = teachers.open_teachers(settings.teachers)
    folder = Folder(out, settings)
    folder.check()
    with processes.first_then_others():
        corpora = prepare(settings, cache, teachers.characters(opened))
        teachers.check_alphabets(opened, corpora.alphabet)
        if processes.rank() == 0:  # not before all that was asked for is there
            folder.begin()
    prepared = time.perf_counter() - start
    there = len(corpora.transcribed)
    if there < settings.student_transcripts:
        warn(f"--student-transcripts {settings.student_transcripts}: there are {there}")
    experiment = Experiment(settings, folder, cache, on, corpora)

    models: dict[str, Trained] = {}
    ssl = self_supervise(experiment)
    if any(teacher is None for teacher, _ in opened):
        models["teacher"] = train_teacher(experiment, "teacher", arms.OWN, ssl)
        own = teachers.Own(models["teacher"].encoder, corpora.alphabet.characters)
        opened = [(teacher or own, weight) for teacher, weight in opened]
    for name in settings.teacher_rows if ssl else ():
        models[f"teacher_{name}"] = train_teacher(
            experiment, f"teacher_{name}", TEACHERS[name], ssl
        )
    for heard in ARMS["distilled"].hears:  # now, to report early a teacher that does not fit
        cache_logits(experiment, opened, getattr(corpora, heard))
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
        {name: x.kept for name, x in models.items() if x.kept},
    )
    results["examples"] = example.texts(experiment, models)
    results = report.keep_times(results, out)
    if processes.rank() == 0:
        example.write(experiment, models["student_distilled"], out)
        report.write(results, out)
    return results


def run_seeds(settings: Settings) -> dict:
    """The experiment once, or once for each of several seeds and a report over all of them."""
    if settings.seeds == 1:
        return run(settings)
    if processes.rank() == 0:
        Folder(Path(settings.out), settings).begin()
    seeds = range(settings.seed, settings.seed + settings.seeds)
    results = [run(with_seed(settings, seed)) for seed in seeds]
    together = report.over_seeds(results)
    if processes.rank() == 0:
        report.write(together, Path(settings.out))
    return together


def main(arguments: list[str] | None = None) -> int:
    settings = parse(arguments)
    try:
        with processes.group(), alone(Path(settings.out)):
            results = run_seeds(settings)
            say(markdown(results))
    except files.TrainError as error:
        write(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        write("stopped: the same command goes on from the last checkpoint", sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
