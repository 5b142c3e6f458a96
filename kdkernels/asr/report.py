"""report.json, with everything that was measured, and report.md, which anyone reads in a minute."""

import json
import math
import platform
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

import kdkernels as kd

from . import decode, plots
from .arms import ARMS, OWN, TEACHERS
from .data import Corpora
from .files import digest, write_bytes
from .settings import Settings
from .training import Point

NAMES = {
    "teacher": OWN.title,
    **{f"teacher_{name}": teacher.title for name, teacher in TEACHERS.items()},
    **{f"student_{name}": arm.title for name, arm in ARMS.items()},
}
WITHOUT, WITH = "student_distilled_without_transcripts", "student_transcribed"  # compared
CAPTIONS = ("captions.wav", "captions.vtt", "captions.srt")
FILES = ("report.json", "report.md", "wer.png", "loss.png", *CAPTIONS)


class Score(NamedTuple):
    words: decode.Errors
    characters: decode.Errors
    real_time_factor: float  # encoder and decoding; features not counted


def reached(curve: list[Point], wer: float) -> Point | None:
    """The first point at or below a dev WER."""
    return next((point for point in curve if point.wer <= wer), None)


def make(
    settings: Settings,
    corpora: Corpora,
    curves: dict[str, list[Point]],
    parameters: dict[str, int],
    scores: dict[str, Score],
    noisy: dict[str, Score],
    loss_ms: dict[str, float],
    machine: dict,
    seconds: dict[str, float],
    kept: dict[str, dict[str, list[int]]],
) -> dict:
    """Everything that was measured, as json writes it."""
    drawn = decode.resamples(len(corpora.test), settings.seed)
    order = [name for name in NAMES if name in scores]
    scores = {name: scores[name] for name in order}
    alone, distilled = (scores[f"student_{name}"].words for name in ("alone", "distilled"))
    best = min(curves["student_alone"], key=lambda point: point.wer)
    same = reached(curves["student_distilled"], best.wer)
    both = [scores[name].words for name in (WITHOUT, WITH) if name in scores]
    behind = len(both) == 2
    sets = corpora.sets()
    return {
        "wer": {name: score.words.percent() for name, score in scores.items()},
        "wer_interval": {n: decode.interval(s.words, drawn) for n, s in scores.items()},
        "cer": {name: score.characters.percent() for name, score in scores.items()},
        "cer_interval": {n: decode.interval(s.characters, drawn) for n, s in scores.items()},
        "noisy_wer": {name: score.words.percent() for name, score in noisy.items()},
        "noisy_wer_interval": {n: decode.interval(s.words, drawn) for n, s in noisy.items()},
        "relative_reduction": 100 * (1 - distilled.percent() / max(alone.percent(), 1e-9)),
        "relative_reduction_interval": decode.reduction_interval(distilled, alone, drawn),
        "behind_transcribed": both[0].percent() - both[1].percent() if behind else None,
        "behind_transcribed_interval": (
            decode.difference_interval(*both, drawn) if behind else None
        ),
        "alone_best": best._asdict(),
        "steps_to_alone_wer": same and same.step,
        "seconds_to_alone_wer": same and same.seconds,
        "loss_ms": loss_ms,
        "step_ms": {name: 1e3 * c[-1].seconds / c[-1].step for name, c in curves.items() if c},
        "real_time_factor": {name: score.real_time_factor for name, score in scores.items()},
        "parameters": parameters,
        "curves": {name: [p._asdict() for p in curve] for name, curve in curves.items()},
        "seconds": seconds,
        "corpus": {
            "speech": "recorded" if settings.transcribed else "synthesised by espeak-ng",
            "sha256": digest(*(data.sha256 for data in sets.values())),
            "skipped": corpora.skipped or {},
            "kept": kept,
            "utterances": {name: len(data) for name, data in sets.items()},
            "hours": {name: data.seconds / 3600 for name, data in sets.items()},
        },
        "settings": asdict(settings),
        "machine": {**machine, "processor": platform.processor() or platform.machine()},
        "versions": {
            "kdkernels": kd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("jiwer", "numpy", "safetensors", "soundfile")},
            **({} if settings.transcribed else {"espeakng-loader": version("espeakng-loader")}),
        },
    }


def transcripts(name: str, counts: dict[str, int]) -> int:
    """How many a model has learned from; those that a teacher wrote are not counted."""
    role, _, arm = name.partition("_")
    if role == "teacher":
        few = TEACHERS[arm].transcripts if arm else None
        return min(few or counts["transcribed"], counts["transcribed"])
    return sum(counts[heard] for heard, whose in ARMS[arm].hears.items() if whose == "human")


def over_seeds(results: list[dict]) -> dict:
    """One report of several seeds: means, and intervals over seeds and utterances together.

    An interval of a mean of n independent seeds: the mean of theirs, widened to the seeds' own
    scatter (the standard error of the mean, times Student's t) where that is the larger.
    """
    together = dict(results[0])

    def mean(table: str, name: str) -> float:
        return statistics.fmean(r[table][name] for r in results)

    def interval(values, intervals, lowest: float = -math.inf) -> list[float]:
        middle, n = statistics.fmean(values), len(values)
        within = statistics.fmean(high - low for low, high in intervals) / 2 / n**0.5
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, 2.57)
        half = max(within, t * statistics.stdev(values) / n**0.5)
        return [max(middle - half, lowest), middle + half]

    for table in ("wer", "cer", "noisy_wer", "loss_ms", "step_ms", "real_time_factor", "seconds"):
        together[table] = {name: mean(table, name) for name in results[0][table]}
    for table in ("wer", "cer", "noisy_wer"):
        together[f"{table}_interval"] = {
            name: interval(
                [r[table][name] for r in results],
                [r[f"{table}_interval"][name] for r in results],
                lowest=0.0,
            )
            for name in results[0][table]
        }
    for name in ("relative_reduction", "behind_transcribed"):
        values = [r[name] for r in results]
        if None not in values:
            together[name] = statistics.fmean(values)
            intervals = [r[f"{name}_interval"] for r in results]
            together[f"{name}_interval"] = interval(values, intervals)
    for name in ("steps_to_alone_wer", "seconds_to_alone_wer"):
        values = [r[name] for r in results]
        together[name] = None if None in values else statistics.fmean(values)
    together["alone_best"] = {
        name: statistics.fmean(r["alone_best"][name] for r in results)
        for name in results[0]["alone_best"]
    }
    together["curves"] = {
        name: [
            {k: statistics.fmean(points[k] for points in at) for k in at[0]}
            for at in zip(*(r["curves"][name] for r in results), strict=True)
        ]
        for name in results[0]["curves"]
    }
    together["seconds"] = {
        name: sum(r["seconds"][name] for r in results) for name in together["seconds"]
    }
    together["seeds"] = [r["settings"]["seed"] for r in results]
    keys = ("wer", "cer", "relative_reduction", "steps_to_alone_wer", "seconds_to_alone_wer")
    together["of_each_seed"] = [{key: r[key] for key in keys} for r in results]
    return together


def signed(reduction: float) -> str:
    """A reduction in percent as a change: "-35"; "0" where it rounds to that."""
    change = round(-reduction)
    return f"{change:+}" if change else "0"


def points(difference: float) -> str:
    """A difference of two rates: "-1.8"; "+0.0" where it rounds to that."""
    return f"{round(difference, 1) + 0.0:+.1f}"


def markdown(r: dict) -> str:
    """The report as a page."""
    hours, counts = r["corpus"]["hours"], r["corpus"]["utterances"]
    synthesised = r["corpus"]["speech"] != "recorded"
    rows = []
    for name, wer in r["wer"].items():
        low, high = r["wer_interval"][name]
        curve = r["curves"].get(name)
        last = curve[-1] if curve else {"step": 0, "seconds": 0.0}
        rows.append(
            f"| {NAMES[name]} | {r['parameters'][name] / 1e6:.2f} M "
            f"| {transcripts(name, counts)} | **{wer:.1f}** [{low:.1f}, {high:.1f}] "
            f"| {r['cer'][name]:.1f} | {last['step']:.0f} | {last['seconds']:.0f} |"
        )
    low, high = r["relative_reduction_interval"]
    best, loss = r["alone_best"], r["loss_ms"]
    if r["steps_to_alone_wer"] is None:
        sooner = "The distilled student did not reach the student alone on the dev set."
    else:
        sooner = (
            f"The best dev WER of the student alone ({best['wer']:.1f} %, step {best['step']:.0f}, "
            f"{best['seconds']:.0f} s) was reached by the distilled one at step "
            f"{r['steps_to_alone_wer']:.0f}, after {r['seconds_to_alone_wer']:.0f} s."
        )
    behind = []
    if r["behind_transcribed"] is not None:
        ends = " to ".join(map(points, r["behind_transcribed_interval"]))
        behind = [
            "- WER of the student distilled without a transcript minus that of the one with "
            f"everything transcribed: {points(r['behind_transcribed'])} points (interval {ends})."
        ]
    source = (
        "The speech is synthesised (espeak-ng, a small grammar, added noise): these figures "
        "compare the rows with each other, and never with LibriSpeech or any other recorded speech."
        if synthesised
        else "The speech is that of the manifests given."
    )
    seeds = r.get("seeds")
    chance = (
        f"- Means over seeds {', '.join(map(str, seeds))}; the intervals cover the choice of test "
        "utterances and the chance of training."
        if seeds
        else "- The intervals cover the choice of test utterances, not the chance of training: for "
        "that, give --seeds 3."
    )
    noise = [
        f"- On the test set with noise added: {NAMES[name]} {wer:.1f} % "
        f"[{', '.join(f'{x:.1f}' for x in r['noisy_wer_interval'][name])}]."
        for name, wer in r["noisy_wer"].items()
    ]
    left_out = [
        f"- Lines that could not be used and were left out: {count} of the {name} set."
        for name, count in r["corpus"]["skipped"].items()
        if count
    ]
    filtered = [
        f"- {NAMES[name]}: {some} of {all_} {heard} utterances; of the others the teacher was not "
        "sure enough, or it heard nothing in them."
        for name, sets in r["corpus"]["kept"].items()
        for heard, (some, all_) in sets.items()
    ]
    drawn = f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {r['settings']['seed']}"
    first = f"seed-{seeds[0]}/" if seeds else ""
    links = ", ".join(f"[{name}]({first}{name})" for name in CAPTIONS)
    examples = [
        f"| {' | '.join(e[k].replace('|', '/') or '-' for k in ('said', 'alone', 'distilled'))} |"
        for e in r["examples"]
    ]
    unseen = "unseen voices and sentences, " if synthesised else ""
    steps = [point["step"] for point in r["curves"]["student_alone"]]
    students = [name for name in r["curves"] if name.startswith("student")]
    curve = [
        f"| {step:.0f} | " + " | ".join(f"{r['curves'][n][i]['wer']:.1f}" for n in students) + " |"
        for i, step in enumerate(steps)
    ]
    return "\n".join(
        [
            "# Distillation report",
            "",
            f"Word error rate on {counts['test']} utterances ({unseen}95 % bootstrap interval), "
            "in percent; lower is better.",
            "",
            "| | parameters | transcripts | WER | CER | steps | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *rows,
            "",
            f"- **Distillation changes the student's WER by {signed(r['relative_reduction'])} %** "
            f"(relative; interval {signed(high)} to {signed(low)}): same seed, same steps, same "
            f"seconds of audio in a step, {hours['untranscribed']:.2f} h of untranscribed audio "
            f"beside {hours['student']:.2f} h of transcribed audio.",
            *behind,
            f"- {sooner}",
            f"- The loss of one step takes {loss['fused']:.2f} ms with kdkernels, "
            f"{loss['torch']:.2f} ms with torch's own ops (relative difference of the two losses: "
            f"{loss['difference']:.0e}), the step {r['step_ms']['student_distilled']:.0f} ms.",
            f"- That loss uses {loss['fused_bytes'] / 1e6:.2f} MB at its peak, torch's "
            f"{loss['torch_bytes'] / 1e6:.2f} MB.",
            *filtered,
            *left_out,
            *noise,
            chance,
            f"- {source}",
            "",
            "![dev WER against steps and seconds](wer.png) ![cost of the loss](loss.png)",
            "",
            f"The first test utterances, one after the other, with the distilled student's "
            f"captions: {links}.",
            "",
            "| what was said | the student alone wrote | the distilled one wrote |",
            "|---|---|---|",
            *examples,
            "",
            "Dev WER against steps:",
            "",
            "| step | " + " | ".join(NAMES[n] for n in students) + " |",
            "|--:|" + "--:|" * len(students),
            *curve,
            "",
            f"Corpus sha256 {r['corpus']['sha256'][:16]}, {drawn}, "
            f"torch {r['versions']['torch']}, {r['machine']['threads']} threads, "
            f"{r['machine']['precision']}; the last command took {r['seconds']['total']:.0f} s.",
            "",
        ]
    )


def write(results: dict, out: Path) -> None:
    write_bytes(out / "report.json", json.dumps(results, indent=1).encode())
    write_bytes(out / "report.md", markdown(results).encode())
    named = {NAMES[name]: curve for name, curve in results["curves"].items() if name in NAMES}
    students = {NAMES[name] for name in results["curves"] if name.startswith("student")}
    write_bytes(out / "wer.png", plots.curves({n: c for n, c in named.items() if n in students}))
    write_bytes(out / "loss.png", plots.loss(results["loss_ms"]))
