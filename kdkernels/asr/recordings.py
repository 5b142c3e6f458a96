"""Recordings -> NAME.txt, NAME.json, NAME.vtt and NAME.srt; of a.mp3 and a.wav, a.mp3.txt, ..."""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

import kdkernels as kd

from . import audio, captions, files, recognise
from .console import progress, warn, write

SUFFIXES = (".txt", ".json", ".vtt", ".srt")
BLOCK = 20.0  # seconds of a recording that are read at a time
PIECE = 4096  # samples, of a file that may be damaged
LEAST = 0.05  # seconds: what may be missing untold, as encoders pad


def blocks(path: Path, seconds: float = BLOCK) -> Iterator[tuple[np.ndarray, int]]:
    """(float32 [samples, channels], rate) of a recording, read as they are asked for.

    Of one that is truncated or damaged, what comes before; then a warning.

    Raises:
        TrainError: it cannot be read.
    """
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else "there is no such file"
        raise files.TrainError(f"{path} cannot be read as audio: {reason}")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise files.TrainError(
            f"{path} cannot be read as audio ({error}); `ffmpeg -i {path} whole.wav` may repair it"
        ) from error
    with file:
        rate = file.samplerate
        if not audio.RATES[0] <= rate <= audio.RATES[1]:
            raise files.TrainError(
                f"{path} has {rate} samples a second, expected one of {audio.RATES[0]} to "
                f"{audio.RATES[1]}"
            )
        samples, size = 0, math.ceil(seconds * rate)
        ended = False
        while not ended:
            block, ended = _read(file, size)
            if not np.isfinite(block).all():
                raise files.TrainError(f"{path} holds samples that are not numbers; replace it")
            samples += len(block)
            if len(block):
                yield block, rate
        lacking = audio.lacking(path, file, samples) / rate
        if not lacking < LEAST:
            what = "its end" if math.isnan(lacking) else f"{lacking:.1f} s"
            warn(
                f"{path} is truncated or damaged: {what} cannot be read, beside "
                f"{samples / rate:.1f} s that can"
            )


def _read(file: soundfile.SoundFile, size: int) -> tuple[np.ndarray, bool]:
    """(float32 [samples, channels], whether nothing comes after), in pieces: what cannot be read
    takes only its piece away."""
    pieces, left = [np.zeros((0, file.channels), np.float32)], size
    try:
        while left and len(piece := file.read(min(left, PIECE), "float32", always_2d=True)):
            pieces.append(piece)
            left -= len(piece)
    except soundfile.SoundFileError:
        return np.concatenate(pieces), True
    return np.concatenate(pieces), left > 0


def transcribe(
    path: Path, outputs: list[Path], model: recognise.Recogniser, doubt: float, late: float
) -> str:
    """Write text, JSON, WebVTT and SRT of one recording; returns a line about them.

    Raises:
        TrainError: the recording cannot be read or the files cannot be written.
    """
    start = time.perf_counter()
    pieces = blocks(path)
    head = next(pieces, None)
    if head is None:
        raise files.TrainError(f"{path} holds no audio")
    files.check_writable(outputs[0].parent)
    rate, samples, cancelled = head[1], 0, False
    with progress(None, path.name, "s", leave=False) as bar:

        def heard() -> Iterator[np.ndarray]:
            nonlocal samples, cancelled
            for block, _ in itertools.chain([head], pieces):
                mixed, cancel = audio.mix(block)
                cancelled |= cancel
                yield mixed
                samples += len(block)
                bar.update(len(block) // rate)

        words = list(recognise.recognise(model, heard(), rate))
    if cancelled:
        warn(f"{path}: {audio.CANCEL}")
    shown = captions.captions(words, doubt, samples / rate, late)
    results = {
        "audio": path.name,
        "seconds": round(samples / rate, 3),
        "kdkernels": kd.__version__,
        "text": " ".join(word.text for word in words),
        "words": [captions.facts(word) for word in words],
        "captions": [
            {"start": c.start / 1000, "end": c.end / 1000, "lines": c.lines} for c in shown
        ],
    }
    contents = (
        captions.text(words, doubt),
        json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        captions.webvtt(shown),
        captions.srt(shown),
    )
    written: list[Path] = []
    try:
        for output, content in zip(outputs, contents, strict=True):
            files.write_bytes(output, content.encode())
            written.append(output)
    except files.TrainError:  # the same command again finds none that exists
        for output in written:
            output.unlink(missing_ok=True)
        raise
    return (
        f"{path}: {samples / rate:.1f} s, {len(words)} words, {len(shown)} captions"
        f"{remarks(shown, samples / rate)}, in {time.perf_counter() - start:.1f} s"
    )


def remarks(shown: list[captions.Caption], seconds: float) -> str:
    """About captions that are late or too fast, where people talk faster than others read."""
    late = max((caption.late for caption in shown), default=0) / 1000
    fast = sum(map(captions.too_fast, shown))
    said = ""
    if late > captions.LATE:
        said += f", up to {late:.1f} s late"
        if shown[-1].start >= 1000 * seconds:
            said += " and after the end of the recording"
        if not fast:
            said += f" (--late {captions.LATE} shows them in time, and too fast to read)"
    if fast:
        said += f", {fast} of them faster than 20 characters a second"
    return said


def outputs_of(paths: list[Path], out: str | None) -> list[list[Path]]:
    """The files to write for each recording; raises where one would replace another."""
    places = [Path(out) if out else path.parent for path in paths]
    stems = [(place / path.stem).resolve() for place, path in zip(places, paths, strict=True)]
    names = [
        path.name if stems.count(stem) > 1 else path.stem
        for path, stem in zip(paths, stems, strict=True)
    ]
    written = [
        [place / (name + suffix) for suffix in SUFFIXES]
        for place, name in zip(places, names, strict=True)
    ]
    seen: dict[Path, Path] = {}
    for path, outputs in zip(paths, written, strict=True):
        other = seen.setdefault(outputs[0].resolve(), path)
        if other is not path:
            raise files.TrainError(f"{other} and {path} would both be written to {outputs[0]}")
        for output in outputs:
            if output.resolve() == path.resolve():
                raise files.TrainError(f"{path} would be overwritten; is it audio?")
    return written


def run(
    paths: list[Path],
    out: str | None,
    force: bool,
    doubt: float,
    late: float,
    model: recognise.Recogniser,
) -> int:
    """All recordings; failures are reported, and the others are done. Returns the exit code."""
    written = outputs_of(paths, out)
    if out:
        files.check_writable(Path(out))
    failed = 0
    for path, outputs in zip(paths, written, strict=True):
        try:
            if not force and (there := [output for output in outputs if output.exists()]):
                raise files.TrainError(f"{path}: {there[0]} exists; --force replaces it")
            write(transcribe(path, outputs, model, doubt, late), sys.stdout)
        except files.TrainError as error:
            failed += 1
            write(f"error: {error}", sys.stderr)
    if failed and len(paths) > 1:
        write(f"{failed} of {len(paths)} recordings could not be done", sys.stderr)
    return int(failed > 0)
