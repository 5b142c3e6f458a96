"""Data sets: feature shards on disk, utterances in memory, alphabets.

A shard holds the features of up to SHARD utterances and is made by a process of its own, so that
what espeak-ng says is a function of the shard alone. An interrupted build resumes at the first
missing shard.
"""

import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import audio, corpus, features
from .espeak import Espeak, paths
from .files import TrainError, digest, load_tensors, save_tensors
from .sources import SHARD, Recorded, report_bad

FORMAT = 3  # raise it whenever the samples or the features change


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

    def utterances(self, bad: dict[int, str]) -> Iterator[tuple]:
        """Yields (samples int16 [samples], text); none is bad."""
        espeak = Espeak()
        for index in range(self.start, self.stop):
            spoken = corpus.utterance(self.seed, self.split, index)
            yield corpus.speak(espeak, spoken), spoken.text


@dataclass(frozen=True)
class Noisy:
    """Another source's utterances with noise added, `snr` dB below the speech."""

    source: "Synthesised | Recorded"
    snr: float
    seed: int

    def key(self) -> list:
        return [type(self.source).__name__, self.source.key(), self.snr, self.seed]

    def __len__(self) -> int:
        return len(self.source)

    def where(self, number: int) -> str:
        return self.source.where(number)

    def utterances(self, bad: dict[int, str]) -> Iterator[tuple]:
        for index, (samples, text) in enumerate(self.source.utterances(bad)):
            rng = np.random.default_rng([self.seed, index])
            speech = samples.astype(np.float32) / 32768
            loud = audio.add_noise(speech, self.snr, rng.uniform(0, 2), rng)
            yield audio.to_int16(loud / max(1.0, np.abs(loud).max())), text


Source = Synthesised | Recorded | Noisy


def synthesised(seed: int, split: str, count: int) -> list[Synthesised]:
    paths()  # raises at once if espeak-ng is missing
    starts = range(0, count, SHARD)
    return [Synthesised(seed, split, start, min(start + SHARD, count)) for start in starts]


@dataclass(frozen=True)
class Dataset:
    """Utterances in memory."""

    features: list[Tensor]  # float16 [frames, MELS] each
    texts: list[str]
    seconds: float  # of audio
    key: str  # digest of what the utterances were made from
    sha256: str  # digest of the samples and texts
    places: list[tuple[Source, int]]  # of each utterance, its source and its index there

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, start: int, stop: int) -> "Dataset":
        chosen, texts = self.features[start:stop], self.texts[start:stop]
        seconds = sum(len(f) for f in chosen) / features.FRAMES_PER_SECOND
        key = digest(self.key, start, stop)
        sha256 = digest(self.sha256, start, stop)
        return Dataset(chosen, texts, seconds, key, sha256, self.places[start:stop])

    def samples(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (index, samples int16 at 16 kHz), for teachers that do not read our features."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.safetensors"
            for source in dict.fromkeys(source for source, _ in self.places):
                _in_fresh_process(_make_samples, source, path)
                tensors, _ = load_tensors(path, "")
                rows = tensors["samples"].split(tensors["lengths"].tolist())
                for index, (own, row) in enumerate(self.places):
                    if own == source:
                        yield index, rows[row]


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
        """[S] classes; characters that are not in the alphabet are left out."""
        return torch.tensor([self._index[c] for c in text if c in self._index], dtype=torch.int64)

    def decode(self, classes: list[int]) -> str:
        return "".join(self.characters[c - 1] for c in classes)


class Corpora(NamedTuple):
    transcribed: Dataset  # teaches the teacher
    student: Dataset  # the first of these: all the transcripts that a student gets
    untranscribed: Dataset
    dev: Dataset
    test: Dataset
    alphabet: Alphabet
    noisy: Dataset | None = None  # `untranscribed` with noise added
    noisy_test: Dataset | None = None
    skipped: dict[str, int] | None = None  # lines left out of each set

    def sets(self) -> dict[str, Dataset]:
        return {n: x for n, x in self._asdict().items() if isinstance(x, Dataset)}


def split_off_dev(transcribed: Dataset) -> tuple[Dataset, Dataset]:
    """The last twentieth, at most 150 utterances, for the dev curves."""
    count = len(transcribed)
    start = count - min(150, (count + 19) // 20)
    if start == 0:
        raise TrainError("one transcribed utterance is too few; give more, or a --dev manifest")
    return transcribed.part(0, start), transcribed.part(start, count)


def shard_key(source: Source) -> str:
    settings = [FORMAT, audio.SAMPLE_RATE, features.MELS, features.HOP, features.FFT]
    return digest(settings, type(source).__name__, source.key())


def make_shard(source: Source, path: Path) -> None:
    """Samples -> features -> one file. Runs in a process of its own."""
    torch.set_num_threads(1)
    rows, texts, samples_seen, sha256 = [], [], 0, hashlib.sha256()
    bad: dict[int, str] = {}
    for samples, text in source.utterances(bad):
        rows.append(features.log_mel(torch.from_numpy(samples)))
        texts.append(text)
        samples_seen += len(samples)
        sha256.update(samples.tobytes() + text.encode() + b"\0")
    tensors = {
        "features": torch.cat([torch.empty(0, features.MELS, dtype=torch.float16), *rows]),
        "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64),
    }
    seconds = samples_seen / audio.SAMPLE_RATE
    facts = {"texts": texts, "seconds": seconds, "sha256": sha256.hexdigest()}
    save_tensors(path, tensors, shard_key(source), bad=list(bad.items()), **facts)


def _make_samples(source: Source, path: Path) -> None:
    """What `Dataset.samples` reads. Runs in a process of its own."""
    rows = [torch.from_numpy(samples) for samples, _ in source.utterances({})]
    lengths = torch.tensor([len(row) for row in rows])
    save_tensors(path, {"samples": torch.cat(rows), "lengths": lengths}, "")


def load(
    sources: list[Source], folder: Path, workers: int, done: Callable, skip_bad: bool = False
) -> Dataset:
    """All utterances of `sources`, from `folder`; missing shards are made first.

    `done(n)` is called after every n utterances, for a progress bar. Audio that cannot be read to
    its end raises a TrainError that lists it, or with `skip_bad` is listed on stderr.
    """
    keys = [shard_key(source) for source in sources]
    files = [folder / f"features-{key[:16]}.safetensors" for key in keys]

    def shard(i: int) -> tuple[dict, dict]:
        found = load_tensors(files[i], keys[i])
        if found is None:
            _in_fresh_process(make_shard, sources[i], files[i])
            found = load_tensors(files[i], keys[i])
        done(len(sources[i]))
        return found

    rows, texts, seconds, places, bad = [], [], 0.0, [], []
    pool = ThreadPoolExecutor(workers)
    try:
        made = pool.map(shard, range(len(sources)))
        for source, (tensors, facts) in zip(sources, made, strict=True):
            rows += tensors["features"].split(tensors["lengths"].tolist())
            places += [(source, row) for row in range(len(facts["texts"]))]
            bad += [f"{source.where(number)}: {reason}" for number, reason in facts["bad"]]
            texts += facts["texts"]
            seconds += facts["seconds"]
            keys.append(facts["sha256"])
    finally:
        pool.shutdown(cancel_futures=True)
    report_bad(bad, f"{len(bad)} of {len(bad) + len(rows)} recordings cannot be used", skip_bad)
    if not rows:
        raise TrainError("no recording of a set can be used; give others")
    shards = len(sources)
    return Dataset(rows, texts, seconds, digest(keys[:shards]), digest(keys[shards:]), places)


def _answer(connection, function: Callable, arguments: tuple) -> None:
    """In the child: run the function, and send what it raised and where, or (None, "").

    It leaves interrupts to the parent, and ends when the parent does, however that ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    raised = None, ""
    try:
        function(*arguments)
    except Exception as error:  # whatever it is: the parent raises it again
        raised = error, traceback.format_exc()
    connection.send(raised)


def _in_fresh_process(function: Callable, *arguments) -> None:
    """Run in a process in which espeak-ng has not spoken yet; what it raises is raised here.

    forkserver: the process is forked from one that has imported everything and done nothing. A
    process pool would not do: when the run is killed, Python warns about its leaked semaphores.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        error, where = here.recv()
    except EOFError:
        raise TrainError(
            "a process that computes features was killed (out of memory?); finished parts are "
            "kept: run the same command again, perhaps with --workers 1"
        ) from None
    finally:
        process.join()
    if error is not None:
        raise error from RuntimeError(where)
