"""Recorded speech: where each utterance is and what is said in it, checked before it is used.

    read(spec, ...)   -> lists of lines, shard by shard
    manifest          JSON lines as NeMo writes them
    kaldi             wav.scp, text, segments
    table             what has rows: a Hugging Face dataset on disk, a torchaudio dataset

Every line that cannot be used is reported with its place, and is left out only on request. Whether
audio can be decoded to its end shows when its features are made.
"""

import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import audio
from .files import TrainError
from .tables import is_hugging_face, open_table

SHARD = 250
SHOWN = 20  # bad lines in a message
# what damaged audio raises, in a file or a table
UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError)
# Apostrophes, and the joiners that only shape letters.
SPELT_ALIKE = {0x2019: "'", 0x02BC: "'", 0xFF07: "'", 0x200C: None, 0x200D: None, 0x00AD: None}


def normalise(text: str) -> str:
    """Lower case; letters with their marks, digits and apostrophes; one space between words."""
    text = unicodedata.normalize("NFC", text.lower()).translate(SPELT_ALIKE)

    def kept(character: str) -> bool:
        return character == "'" or unicodedata.category(character)[0] in "LMN"

    return " ".join("".join(c if kept(c) else " " for c in text).split())


class Line(NamedTuple):
    """One utterance: of a file, from start to stop in seconds; or row `row` of a table."""

    path: str  # of the audio, or the table's spec
    text: str
    start: float = 0.0
    stop: float | None = None
    row: int | None = None
    where: str = ""  # of the line, for messages

    def decoded(self) -> tuple[np.ndarray, int]:
        """(float [samples, channels], rate). Raises ValueError where they cannot be read whole."""
        try:
            if self.row is None:
                samples, rate = audio.decode(Path(self.path), self.start, self.stop)
            else:
                samples, rate = open_table(self.path).audio(self.row)
            if not np.isfinite(samples).all():
                raise ValueError("holds samples that are not numbers")
        except UNREADABLE as error:
            what = f"{self.path} " if self.row is None else ""
            raise ValueError(f"{what}{error}; replace it or remove the line") from error
        return samples, rate


@dataclass(frozen=True)
class Recorded:
    """Up to SHARD lines: what one shard of features is made of."""

    lines: tuple[Line, ...]

    def key(self) -> list:
        def stamp(line: Line):
            if line.row is not None:
                return open_table(line.path).key
            stat = Path(line.path).stat()
            return stat.st_size, stat.st_mtime_ns

        lines = [line._replace(where="") for line in self.lines]
        return [lines, [stamp(line) for line in lines]]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, number: int) -> str:
        return self.lines[number].where

    def utterances(self, bad: dict[int, str]) -> Iterator[tuple[np.ndarray, str]]:
        """Yields (samples int16 [samples] at 16 kHz, text); puts into `bad` the numbers of the
        lines that cannot be read, with the reason."""
        for number, line in enumerate(self.lines):
            try:
                samples, rate = line.decoded()
            except ValueError as error:
                bad[number] = str(error)
                continue
            yield audio.mono(samples, rate), line.text


class BadLineError(Exception):
    """A line that cannot be used; the message says where and why."""


def read(spec: str, transcripts: bool, skip_bad: bool = False) -> tuple[list[Recorded], int]:
    """(shards, lines left out) of a data set. `transcripts`: whether its text is needed.

    Raises TrainError, naming every bad line, unless `skip_bad`: then they are named on stderr.
    """
    path = Path(spec)
    if spec.startswith("torchaudio:") or is_hugging_face(path):
        lines = _table(spec, transcripts)
    elif path.is_dir():
        lines = _kaldi(path, transcripts)
    else:
        lines = _manifest(path, transcripts)
    good, bad = [], []
    for line in lines:
        try:
            good.append(line())
        except BadLineError as error:
            bad.append(str(error))
    report_bad(
        bad, f"{len(bad)} of {len(good) + len(bad)} lines of {spec} cannot be used", skip_bad
    )
    if not good:
        raise TrainError(f"{spec} has no utterance that can be used; write one per line")
    return [Recorded(tuple(good[i : i + SHARD])) for i in range(0, len(good), SHARD)], len(bad)


def report_bad(bad: list[str], count: str, skip_bad: bool) -> None:
    """Raise a TrainError that lists the bad lines, if any; with `skip_bad`, only list them."""
    if bad:
        more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        listed = "\n  ".join([*bad[:SHOWN], *more])
        if not skip_bad:
            raise TrainError(f"{count}; fix them, or leave them out with --skip-bad:\n  {listed}")
        print(f"warning: {count} and are left out:\n  {listed}", file=sys.stderr)


def _rows(path: Path) -> list[tuple[str, bytes]]:
    """(place, line) of a text file, empty lines left out."""
    try:
        rows = path.read_bytes().split(b"\n")  # not `splitlines`: a text may hold U+2028
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error}") from error
    numbered = enumerate(rows, 1)
    return [
        (f"{path}, line {i}", row) for i, row in numbered if row.decode(errors="replace").strip()
    ]


def _decoded(where: str, row: bytes) -> str:
    try:
        return row.decode().strip()
    except UnicodeDecodeError as error:
        raise BadLineError(f"{where}: not UTF-8 ({error}); write the file in UTF-8") from error


def _text(where: str, text, transcripts: bool) -> str:
    if not transcripts:
        return ""
    if not isinstance(text, str):
        raise BadLineError(f"{where}: `text` is not text but {text!r}")
    if not normalise(text):
        raise BadLineError(
            f"{where}: `text` has no word; transcribe the utterance or drop the line"
        )
    return normalise(text)


# ---- formats: each yields functions that make one line or raise BadLineError ---------------------


def _manifest(path: Path, transcripts: bool) -> Iterator[Callable[[], Line]]:
    example = '{"audio_filepath": "a.wav", "duration": 3.1, "text": "hello"}'

    def line(where: str, row: bytes) -> Line:
        def bad(reason: str) -> BadLineError:
            return BadLineError(f"{where}: {reason}; expected e.g. {example}")

        def number(name: str) -> float | None:
            value = entry.get(name)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise bad(f"`{name}` is not a number but {value!r}")
            try:
                seconds = float(value)
            except (ValueError, OverflowError) as error:
                raise bad(f"`{name}` is not a number but {value!r:.40}") from error
            if not 0 <= seconds < math.inf:
                raise bad(f"`{name}` must be seconds from 0 on, got {value!r}")
            return seconds

        written = _decoded(where, row)
        try:
            entry = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise bad(f"not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise bad(f"not a JSON object but {written[:40]}")
        for name in ("audio_filepath", *(["text"] if transcripts else [])):
            if name not in entry:
                raise bad(f"`{name}` is missing")
        if not isinstance(entry["audio_filepath"], str):
            raise bad(f"`audio_filepath` is not text but {entry['audio_filepath']!r}")
        text = _text(where, entry.get("text"), transcripts)
        duration, offset = number("duration"), number("offset")
        if offset is not None and duration is None:
            raise bad("an `offset` needs a `duration`")
        start = offset or 0.0
        end = None if duration is None else start + duration
        promise = "" if duration is None else f"`duration` promises {duration:.1f} s"
        promise += f" from {start:.1f} s on" if start else ""
        file = path.parent / entry["audio_filepath"]
        file, seconds = _checked(file, start, end, where, promise)
        # a duration alone is often the whole file's, rounded
        part = offset is not None or (end is not None and audio.clearly_shorter(end, seconds))
        return Line(file, text, start, end if part else None, where=where)

    for where, row in _rows(path):
        yield lambda where=where, row=row: line(where, row)


def _checked(
    file: Path, start: float, end: float | None, where: str, promise: str
) -> tuple[str, float]:
    """(the file's whole path, its seconds)."""
    try:
        file = file.resolve()
        seconds = audio.check(file, where, start, end, promise)
    except TrainError as error:
        raise BadLineError(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, links in a circle
        reason = getattr(error, "strerror", None) or error
        raise BadLineError(
            f"{where}: its file cannot be opened ({reason}); fix the path"
        ) from error
    return str(file), seconds


def _kaldi(folder: Path, transcripts: bool) -> Iterator[Callable[[], Line]]:
    if not (folder / "wav.scp").is_file():
        raise TrainError(
            f"{folder} has no wav.scp: expected a Kaldi folder, a folder that "
            "datasets.save_to_disk wrote, or a file of JSON lines"
        )

    unusable: list[BadLineError] = []

    def entries(name: str) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for where, row in _rows(folder / name):
            try:
                key, *rest = _decoded(where, row).split(maxsplit=1)
                if key in found:
                    raise BadLineError(f"{where}: {found[key][0]} is for {key} too; keep one")
                found[key] = where, "".join(rest)
            except BadLineError as error:
                unusable.append(error)
        return found

    recordings = entries("wav.scp")
    texts = entries("text") if transcripts else {}
    segments = entries("segments") if (folder / "segments").exists() else None

    def line(key: str, where: str, row: str) -> Line:
        start, stop = 0.0, None
        recording = key
        if segments is not None:
            try:
                recording, first, last = row.split()
                start, stop = float(first), float(last)
            except ValueError as error:
                raise BadLineError(f"{where}: expected `utterance recording start end`") from error
            if not 0 <= start < stop:
                raise BadLineError(f"{where}: the segment ends before it begins")
        if recording not in recordings:
            raise BadLineError(f"{where}: wav.scp has no recording {recording}")
        path = recordings[recording][1]
        if not path or path.endswith("|"):
            what = "no file but a command" if path else f"no file for {recording}"
            raise BadLineError(f"{recordings[recording][0]}: {what}; write a path")
        if transcripts and key not in texts:
            raise BadLineError(f"{where}: {folder / 'text'} has no line {key}")
        text = _text(*texts[key], transcripts) if transcripts else ""
        file = Path(path) if os.path.exists(path) else folder / path
        promise = "" if stop is None else f"the segment ends at {stop:.1f} s"
        file, _ = _checked(file, start, stop, where, promise)
        return Line(file, text, start, stop, where=where)

    utterances = recordings if segments is None else segments

    def unheard(key: str, where: str) -> Line:
        name = "wav.scp" if segments is None else "segments"
        raise BadLineError(f"{where}: {folder / name} has no line {key}")

    def refused(error: BadLineError) -> Line:
        raise error

    for error in unusable:
        yield lambda error=error: refused(error)
    for key, (where, row) in utterances.items():
        yield lambda key=key, where=where, row=row: line(key, where, row)
    for key, (where, _) in texts.items():
        if key not in utterances:
            yield lambda key=key, where=where: unheard(key, where)


def _table(spec: str, transcripts: bool) -> Iterator[Callable[[], Line]]:
    table = open_table(spec)

    def line(row: int) -> Line:
        where = f"{spec}, row {row}"
        try:
            text = table.text(row) if transcripts else ""
            table.check(row)
        except UNREADABLE as error:
            raise BadLineError(f"{where}: {error}") from error
        return Line(spec, _text(where, text, transcripts), row=row, where=where)

    for row in range(len(table)):
        yield lambda row=row: line(row)
