"""report.json: everything that was measured, of one seed or several; and what is made from it."""

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
from .arms import TITLES
from .data import Corpora
from .files import digest, write_bytes
from .markdown import CAPTIONS, markdown
from .settings import Settings
from .training import Point

WITHOUT, WITH = "student_distilled_without_transcripts", "student_transcribed"  # compared
FILES = ("report.json", "report.md", "wer.png", "loss.png", *CAPTIONS)
TIMED = ("loss_ms", "real_time_factor", "seconds")  # what is measured anew at every command


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
    """Everything that was measured, as JSON types."""
    drawn = decode.resamples(len(corpora.test), settings.seed)
    order = [name for name in TITLES if name in scores]
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


def keep_times(results: dict, out: Path) -> dict:
    """The results; where OUT has them already, all but the times, with the times that it has."""
    results = json.loads(json.dumps(results))
    try:
        old = json.loads((out / "report.json").read_text())
        times = {name: old[name] for name in TIMED}
        alike = all(times[name].keys() == results[name].keys() for name in TIMED)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return results
    return old if alike and {**results, **times} == old else results


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


def write(results: dict, out: Path) -> None:
    write_bytes(out / "report.json", json.dumps(results, indent=1).encode())
    write_bytes(out / "report.md", markdown(results).encode())
    curves = results["curves"].items()
    students = {TITLES[name]: curve for name, curve in curves if name.startswith("student")}
    write_bytes(out / "wer.png", plots.curves(students))
    write_bytes(out / "loss.png", plots.loss(results["loss_ms"]))
