"""report.json, with everything that was measured, and report.md, which anyone reads in a minute."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

import kdkernels as kd

from . import decode
from .data import Corpora
from .files import digest, write_bytes
from .model import Encoder
from .settings import Settings
from .training import Point

NAMES = {
    "teacher": "teacher",
    "student_alone": "student alone",
    "student_distilled": "student distilled",
    "student_distilled_without_transcripts": "student distilled, no transcript",
}


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
    models: dict[str, tuple[Encoder, list[Point]]],
    scores: dict[str, Score],
    loss_ms: dict[str, float],
    machine: dict,
    seconds: dict[str, float],
) -> dict:
    """Everything, ready for json. Rates are in percent, times in seconds unless named otherwise."""
    drawn = decode.resamples(len(corpora.test), settings.seed)
    curves = {name: curve for name, (_, curve) in models.items()}
    alone, distilled = (scores[f"student_{name}"].words for name in ("alone", "distilled"))
    best = min(curves["student_alone"], key=lambda point: point.wer)
    same = reached(curves["student_distilled"], best.wer)
    sets = {name: data for name, data in corpora._asdict().items() if name != "alphabet"}
    return {
        "wer": {name: score.words.percent() for name, score in scores.items()},
        "wer_interval": {n: decode.interval(s.words, drawn) for n, s in scores.items()},
        "cer": {name: score.characters.percent() for name, score in scores.items()},
        "cer_interval": {n: decode.interval(s.characters, drawn) for n, s in scores.items()},
        "relative_reduction": 100 * (1 - distilled.percent() / max(alone.percent(), 1e-9)),
        "relative_reduction_interval": decode.reduction_interval(distilled, alone, drawn),
        "alone_best": best._asdict(),
        "steps_to_alone_wer": same and same.step,
        "seconds_to_alone_wer": same and same.seconds,
        "loss_ms": loss_ms,
        "step_ms": {name: 1e3 * c[-1].seconds / c[-1].step for name, c in curves.items()},
        "real_time_factor": {name: score.real_time_factor for name, score in scores.items()},
        "parameters": {name: encoder.parameter_count() for name, (encoder, _) in models.items()},
        "curves": {name: [p._asdict() for p in curve] for name, curve in curves.items()},
        "seconds": seconds,
        "corpus": {
            "speech": "recorded" if settings.transcribed else "synthesised by espeak-ng",
            "sha256": digest(*(data.sha256 for data in sets.values())),
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


def markdown(r: dict) -> str:
    """The report as a page."""
    hours, counts = r["corpus"]["hours"], r["corpus"]["utterances"]
    synthesised = r["corpus"]["speech"] != "recorded"
    transcripts = {
        "teacher": counts["transcribed"],
        "student_distilled_without_transcripts": 0,
    }
    rows = []
    for name, wer in r["wer"].items():
        low, high = r["wer_interval"][name]
        last = r["curves"][name][-1]
        rows.append(
            f"| {NAMES[name]} | {r['parameters'][name] / 1e6:.2f} M "
            f"| {transcripts.get(name, counts['student'])} | **{wer:.1f}** [{low:.1f}, {high:.1f}] "
            f"| {r['cer'][name]:.1f} | {last['step']} | {last['seconds']:.0f} |"
        )
    low, high = r["relative_reduction_interval"]
    best, loss = r["alone_best"], r["loss_ms"]
    if r["steps_to_alone_wer"] is None:
        sooner = "The distilled student did not reach the student alone on the dev set."
    else:
        sooner = (
            f"The best dev WER of the student alone ({best['wer']:.1f} %, step {best['step']}, "
            f"{best['seconds']:.0f} s) was reached by the distilled one at step "
            f"{r['steps_to_alone_wer']}, after {r['seconds_to_alone_wer']:.0f} s."
        )
    source = (
        "The speech is synthesised (espeak-ng, a small grammar, added noise): these figures "
        "compare the rows with each other, and never with LibriSpeech or any other recorded speech."
        if synthesised
        else "The speech is that of the manifests given."
    )
    unseen = "unseen voices and sentences, " if synthesised else ""
    steps = [point["step"] for point in r["curves"]["student_alone"]]
    students = [name for name in r["curves"] if name != "teacher"]
    curve = [
        f"| {step} | " + " | ".join(f"{r['curves'][n][i]['wer']:.1f}" for n in students) + " |"
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
            f"- **Distillation changes the student's WER by {-r['relative_reduction']:+.0f} %** "
            f"(relative; interval {-high:+.0f} to {-low:+.0f}): same seed, same steps, same "
            f"seconds of audio in a step, {hours['untranscribed']:.2f} h of untranscribed audio "
            f"beside {hours['student']:.2f} h of transcribed audio.",
            f"- {sooner}",
            f"- The loss of one step takes {loss['fused']:.2f} ms with kdkernels, "
            f"{loss['torch']:.2f} ms with torch's own ops (relative difference of the two losses: "
            f"{loss['difference']:.0e}), the step {r['step_ms']['student_distilled']:.0f} ms.",
            "- The intervals cover the choice of test utterances, not the chance of training: for "
            "that, try another --seed.",
            f"- {source}",
            "",
            "Dev WER against steps:",
            "",
            "| step | " + " | ".join(NAMES[n] for n in students) + " |",
            "|--:|" + "--:|" * len(students),
            *curve,
            "",
            f"Corpus sha256 {r['corpus']['sha256'][:16]}, seed {r['settings']['seed']}, "
            f"torch {r['versions']['torch']}, {r['machine']['threads']} threads, "
            f"{r['machine']['precision']}, {r['seconds']['total']:.0f} s in all.",
            "",
        ]
    )


def write(results: dict, out: Path) -> None:
    write_bytes(out / "report.json", json.dumps(results, indent=1).encode())
    write_bytes(out / "report.md", markdown(results).encode())
