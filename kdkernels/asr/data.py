"""Manifests, and feature shards on disk.

A shard holds the features of up to SHARD utterances and is made by a process of its own, so that
what espeak-ng says is a function of the shard alone. An interrupted build goes on at the first
shard that is missing.
"""

import hashlib
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import audio, corpus, features
from .espeak import Espeak, paths
from .files import TrainError, digest, load_tensors, save_tensors

SHARD = 250
FORMAT = 1  # to be raised whenever the samples or the features change


def normalise(text: str) -> str:
    """Lower case; letters, digits and apostrophes; one space between words."""
    return " ".join(re.sub(r"[^\w']|_", " ", text.lower()).split())


# ---- what a shard is made of: picklable, and callable in a fresh process -------------------------


@dataclass(frozen=True)
class Synthesised:
    """Utterances [start, stop) of a split of the synthesised corpus."""

    seed: int
    split: str
    start: int
    stop: int

    def key(self) -> list:
        return [version("espeakng-loader"), self.seed, self.split, self.start, self.stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def utterances(self) -> Iterator[tuple]:
        """Yields (samples int16 [samples], text)."""
        espeak = Espeak()
        for index in range(self.start, self.stop):
            spoken = corpus.utterance(self.seed, self.split, index)
            yield corpus.speak(espeak, spoken), spoken.text


@dataclass(frozen=True)
class Recorded:
    """Lines of a manifest: (path, text) each."""

    lines: tuple[tuple[str, str], ...]

    def key(self) -> list:
        stats = [Path(path).stat() for path, _ in self.lines]
        return [self.lines, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]

    def __len__(self) -> int:
        return len(self.lines)

    def utterances(self) -> Iterator[tuple]:
        for path, text in self.lines:
            yield audio.read(Path(path)), text


def synthesised(seed: int, split: str, count: int) -> list[Synthesised]:
    paths()  # a missing espeak-ng is told at once
    starts = range(0, count, SHARD)
    return [Synthesised(seed, split, start, min(start + SHARD, count)) for start in starts]


def recorded(manifest: str, transcripts: bool) -> list[Recorded]:
    """A NeMo manifest, every line and every file checked. `transcripts`: whether text is needed."""
    path = Path(manifest)
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"cannot read the manifest {manifest}: {error}") from error
    lines = []
    for number, row in enumerate(rows, 1):
        if row.strip():
            lines.append(_line(path, f"{manifest}, line {number}", row, transcripts))
    if not lines:
        raise TrainError(f"the manifest {manifest} has no line; write one per utterance")
    return [Recorded(tuple(lines[i : i + SHARD])) for i in range(0, len(lines), SHARD)]


def _line(manifest: Path, where: str, row: str, transcripts: bool) -> tuple[str, str]:
    """(audio path, text) of one line."""
    example = '{"audio_filepath": "a.wav", "duration": 3.1, "text": "hello"}'
    try:
        entry = json.loads(row)
        filepath = entry["audio_filepath"]
        text = normalise(entry["text"]) if transcripts else ""
        duration = entry.get("duration")
        duration = None if duration is None else float(duration)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise TrainError(f"{where}: {reason}; expected e.g. {example}") from error
    if not isinstance(filepath, str):
        raise TrainError(f"{where}: `audio_filepath` is no text; expected e.g. {example}")
    if transcripts and not text:
        raise TrainError(f"{where}: `text` has no word; transcribe the utterance or drop the line")
    file = manifest.parent / filepath
    audio.check(file, duration, where)
    return str(file.resolve()), text


@dataclass(frozen=True)
class Dataset:
    """Utterances in memory."""

    features: list[Tensor]  # float16 [frames, MELS] each
    texts: list[str]
    seconds: float  # of audio
    key: str  # of what the utterances are
    sha256: str  # of the samples and texts

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, start: int, stop: int) -> "Dataset":
        chosen, texts = self.features[start:stop], self.texts[start:stop]
        seconds = sum(len(f) for f in chosen) / features.FRAMES_PER_SECOND
        key = digest(self.key, start, stop)
        return Dataset(chosen, texts, seconds, key, digest(self.sha256, start, stop))


class Alphabet:
    """Characters <-> classes 1, 2, ...; class 0 is the CTC blank."""

    def __init__(self, characters: str):
        self.characters = characters
        self._index = {character: i for i, character in enumerate(characters, 1)}

    @classmethod
    def of(cls, texts: list[str]) -> "Alphabet":
        return cls("".join(sorted(set("".join(texts)))))

    def __len__(self) -> int:
        return 1 + len(self.characters)

    def encode(self, text: str) -> Tensor:
        """[S] classes; characters outside the alphabet are left out."""
        return torch.tensor([self._index[c] for c in text if c in self._index], dtype=torch.int64)

    def decode(self, classes: list[int]) -> str:
        return "".join(self.characters[c - 1] for c in classes)


class Corpora(NamedTuple):
    transcribed: Dataset  # teaches the teacher
    student: Dataset  # its first utterances: all the transcripts that a student gets
    untranscribed: Dataset
    dev: Dataset
    test: Dataset
    alphabet: Alphabet


def split_off_dev(transcribed: Dataset) -> tuple[Dataset, Dataset]:
    """The last twentieth, at most 150 utterances, for the dev curves."""
    count = len(transcribed)
    start = count - min(150, (count + 19) // 20)
    if start == 0:
        raise TrainError("one transcribed utterance is too few; give more, or a --dev manifest")
    return transcribed.part(0, start), transcribed.part(start, count)


Source = Synthesised | Recorded


def shard_key(source: Source) -> str:
    settings = [FORMAT, audio.SAMPLE_RATE, features.MELS, features.HOP, features.FFT]
    return digest(settings, type(source).__name__, source.key())


def make_shard(source: Source, path: Path) -> None:
    """Samples -> features -> one file. Runs in a process of its own."""
    torch.set_num_threads(1)
    rows, texts, samples_seen, sha256 = [], [], 0, hashlib.sha256()
    for samples, text in source.utterances():
        rows.append(features.log_mel(torch.from_numpy(samples)))
        texts.append(text)
        samples_seen += len(samples)
        sha256.update(samples.tobytes() + text.encode() + b"\0")
    tensors = {
        "features": torch.cat(rows),
        "lengths": torch.tensor([len(row) for row in rows]),
    }
    seconds = samples_seen / audio.SAMPLE_RATE
    facts = {"texts": texts, "seconds": seconds, "sha256": sha256.hexdigest()}
    save_tensors(path, tensors, shard_key(source), **facts)


def load(sources: list[Source], folder: Path, workers: int, done: Callable) -> Dataset:
    """All utterances of `sources`, from `folder`; missing shards are made first.

    `done(n)` is called after every n utterances, for a progress bar.
    """
    keys = [shard_key(source) for source in sources]
    files = [folder / f"features-{key[:16]}.safetensors" for key in keys]

    def shard(i: int) -> tuple[dict, dict]:
        found = load_tensors(files[i], keys[i])
        if found is None:
            _in_fresh_process(make_shard, sources[i], files[i])
            found = load_tensors(files[i], keys[i])
        done(len(found[1]["texts"]))
        return found

    rows, texts, seconds = [], [], 0.0
    pool = ThreadPoolExecutor(workers)
    try:
        for tensors, facts in pool.map(shard, range(len(sources))):
            rows += tensors["features"].split(tensors["lengths"].tolist())
            texts += facts["texts"]
            seconds += facts["seconds"]
            keys.append(facts["sha256"])
    finally:
        pool.shutdown(cancel_futures=True)
    shards = len(sources)
    return Dataset(rows, texts, seconds, digest(keys[:shards]), digest(keys[shards:]))


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_fresh_process(function: Callable, *arguments) -> None:
    """Run in a process that has never spoken; what it raises is raised here.

    forkserver: the process is forked from one that has imported everything and done nothing.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, context, _leave_interrupts_to_the_parent) as executor:
            executor.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise TrainError(
            "a process that computes features was killed (out of memory?); finished parts are "
            "kept: run the same command again, perhaps with --workers 1"
        ) from error
