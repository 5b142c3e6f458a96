"""How far word times and confidences are from the truth.

    python benchmarks/word_times.py --model RUN

espeak-ng reports when each word that it speaks begins. Sentences of a split (unseen voices), with
noise and rooms as in training, are recognised, and their known transcripts are aligned. Errors are
estimate - truth; of recognised words only the right ones count. Also: how well the confidence tells
right words from wrong ones (area under the ROC curve; 0.5 is chance).
"""

import argparse
import ctypes
import itertools
import json
from pathlib import Path

import jiwer
import numpy as np
import torch

from kdkernels.asr import audio, corpus, espeak, recognise
from kdkernels.asr.captions import Word

WORD, LAST = 1, 0  # types of espeak-ng's events


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class TimedEspeak(espeak.Espeak):
    """Keeps the words' positions: (position in the text, seconds)."""

    def _receive(self, samples, count, events) -> int:
        array = ctypes.cast(events, ctypes.POINTER(Event))
        for event in itertools.takewhile(lambda e: e.type != LAST, (array[i] for i in range(9999))):
            if event.type == WORD:
                self.positions.append((event.text_position - 1, event.audio_position / 1000))
        return super()._receive(samples, count, events)

    def speak(self, text, *voice):
        self.positions = []
        return super().speak(text, *voice)


def spoken(
    speaker: TimedEspeak, seed: int, split: str, index: int
) -> tuple[np.ndarray, list[Word]]:
    """(int16 samples, words with their true starts); the end is the next one's start."""
    said = corpus.utterance(seed, split, index)
    samples = corpus.speak(speaker, said)
    starts = dict(speaker.positions)
    begins = [0, *(i + 1 for i, c in enumerate(said.text) if c == " ")]
    if len(starts) != len(speaker.positions) or not set(begins) <= starts.keys():
        return samples, []  # espeak-ng runs some words together: no truth for these
    times = [starts[begin] for begin in begins]
    ends = [*times[1:], len(samples) / audio.SAMPLE_RATE]
    words = said.text.split()
    return samples, [Word(*fact, 1.0) for fact in zip(words, times, ends, strict=True)]


def matched(truth: list[Word], found: list[Word]) -> list[tuple[Word | None, Word]]:
    """(true word or None, recognised word) in order, by the alignment of fewest edits."""
    texts = (" ".join(word.text for word in words) for words in (truth, found))
    pairs: list[tuple[Word | None, Word]] = []
    for chunk in jiwer.process_words(*texts).alignments[0]:
        for k in range(chunk.hyp_end_idx - chunk.hyp_start_idx):
            right = chunk.type == "equal"
            true = truth[chunk.ref_start_idx + k] if right else None
            pairs.append((true, found[chunk.hyp_start_idx + k]))
    return pairs


def summary(errors: list[float]) -> dict[str, float]:
    """Milliseconds, and shares."""
    values = 1000 * np.array(errors)
    size = np.abs(values)
    return {
        "words": len(values),
        "bias": round(float(np.median(values)), 1),
        "median": round(float(np.median(size)), 1),
        "90 %": round(float(np.percentile(size, 90)), 1),
        "within 50 ms": round(float((size <= 50).mean()), 3),
        "within 100 ms": round(float((size <= 100).mean()), 3),
    }


def area(right: list[float], wrong: list[float]) -> float:
    """The chance that a right word is more certain than a wrong one."""
    right, wrong = np.array(right)[:, None], np.array(wrong)
    return float(((right > wrong) + 0.5 * (right == wrong)).mean())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as of python -m kdkernels.transcribe")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--utterances", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    recogniser = recognise.load(Path(chosen.model))
    speaker = TimedEspeak()
    names = ("recognised, start", "recognised, end", "aligned, start", "aligned, end")
    errors: dict[str, list[float]] = {name: [] for name in names}
    certain: dict[bool, list[float]] = {True: [], False: []}
    for index in range(chosen.utterances):
        samples, truth = spoken(speaker, chosen.seed, chosen.split, index)
        if not truth:
            continue
        block = samples.astype(np.float32) / 32768
        found = list(recognise.recognise(recogniser, [block], audio.SAMPLE_RATE))
        frames = recognise.frames(recogniser, [block], audio.SAMPLE_RATE)
        text = " ".join(word.text for word in truth)
        known = recognise.align(torch.cat(list(frames)), text, recogniser)
        for true, word in matched(truth, found):
            certain[true is not None].append(word.confidence)
            if true:
                note(errors, "recognised", true, word, true is truth[-1])
        for true, word in zip(truth, known, strict=True):
            note(errors, "aligned", true, word, true is truth[-1])
    results = {name: summary(values) for name, values in errors.items()}
    results["confidence"] = {
        "right": len(certain[True]),
        "wrong": len(certain[False]),
        "area under the ROC curve": round(area(certain[True], certain[False]), 3),
        "of words below 0.5, wrong": share(certain, lambda c: c < 0.5),
        "of words above 0.5, wrong": share(certain, lambda c: c >= 0.5),
    }
    for name, values in results.items():
        print(f"{name}: {json.dumps(values)}")


def share(certain: dict[bool, list[float]], chosen) -> float:
    right, wrong = (sum(map(chosen, certain[kind])) for kind in (True, False))
    return round(wrong / max(1, right + wrong), 3)


def note(errors: dict[str, list[float]], name: str, true: Word, word: Word, last: bool) -> None:
    errors[f"{name}, start"].append(word.start - true.start)
    if not last:  # the truth has no end of the last word
        errors[f"{name}, end"].append(word.end - true.end)


if __name__ == "__main__":
    main()
