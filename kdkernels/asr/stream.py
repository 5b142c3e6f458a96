"""Standard input -> words, printed as they become final."""

import json
import math
import statistics
import sys
import time
import wave
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from . import audio, captions, console, files, recognise

BLOCK = 0.1  # seconds
FORMATS = {  # first bytes of streams that are neither raw samples nor wav
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"FORM": "aiff",
    b"caff": "caf",
    b".snd": "au",
    b"RF64": "rf64",
    b"\x1aE\xdf\xa3": "matroska or webm",
}


class _Rewound:
    """A stream that cannot seek, read from its beginning although `head` was read before."""

    def __init__(self, head: bytes, rest: BinaryIO):
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._rest.read(size - len(head)) if len(head) < size else head


def _format(head: bytes) -> str | None:
    """The format of a stream that begins with these 8 bytes; None for raw samples and wav."""
    if head[4:] == b"ftyp":
        return "mp4"
    if len(head) > 2 and head[0] == 0xFF and head[1] in b"\xe2\xe3\xf2\xf3\xfa\xfb":
        # a frame of layer III, if its bit rate and its sample rate exist
        exist = 0x10 <= head[2] < 0xF0 and head[2] & 0x0C != 0x0C
        return "mp3" if exist else None
    return next((name for magic, name in FORMATS.items() if head.startswith(magic)), None)


def _plain(head: bytes) -> bytes:
    """The first 46 bytes of a wav stream, where WAVE_FORMAT_EXTENSIBLE, which Python 3.11's `wave`
    does not know, is replaced by the code of the format it extends."""
    extensible = head[12:16] == b"fmt " and head[20:22] == b"\xfe\xff"
    return head[:20] + head[44:46] + head[22:] if extensible else head


def blocks(
    stream: BinaryIO, rate: int, channels: int, seconds: float = BLOCK
) -> tuple[int, Iterator[np.ndarray]]:
    """(rate, float32 [samples, channels] blocks) of raw 16-bit samples, or of wav, which says so.

    Raises:
        TrainError: a wav stream that is not 16-bit PCM, or a stream of another format.
    """
    head = stream.read(8)
    if other := _format(head):
        raise files.TrainError(
            f"the stream is {other}, expected raw 16-bit samples or wav, e.g. of `ffmpeg -i FILE "
            "-f wav -`; a file is read as it is: give its name in place of --stream"
        )
    read = _Rewound(head, stream).read
    if head.startswith(b"RIFF"):
        try:
            opened = wave.open(_Rewound(_plain(head + stream.read(38)), stream))  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise files.TrainError(f"the wav stream cannot be read ({error}); send PCM") from error
        rate, channels = opened.getframerate(), opened.getnchannels()
        if opened.getsampwidth() != 2:
            bits = 8 * opened.getsampwidth()
            raise files.TrainError(f"the wav stream has {bits} bits a sample; send 16")
        if not audio.RATES[0] <= rate <= audio.RATES[1]:
            raise files.TrainError(
                f"the wav stream has {rate} samples a second, expected one of "
                f"{audio.RATES[0]} to {audio.RATES[1]}"
            )

        def read(size: int) -> bytes:
            return opened.readframes(size // (2 * channels))

    size = 2 * channels * math.ceil(seconds * rate)

    def pieces() -> Iterator[np.ndarray]:
        while data := read(size):
            data = data[: len(data) // (2 * channels) * 2 * channels]  # a sample cut short
            samples = np.frombuffer(data, "<i2").reshape(-1, channels)
            yield samples.astype(np.float32) / 32768

    return rate, pieces()


def run(
    source: BinaryIO,
    rate: int,
    channels: int,
    doubt: float,
    as_json: bool,
    model: recognise.Recogniser,
) -> int:
    """Words to standard output, a new line after a pause; latencies to standard error.

    The audio latency of a word is what was read after its end when it was printed; processing is
    the time from a block's arrival to the last word that it decided. The summary leaves out words
    that the end of the stream made final: what comes after them was not waited for.
    """
    rate, pieces = blocks(source, rate, channels)
    samples, arrived, computing, ended = 0, time.perf_counter(), 0.0, False
    cancelled = False

    def heard() -> Iterator[np.ndarray]:
        nonlocal samples, arrived, computing, ended, cancelled
        for block in pieces:
            samples, arrived = samples + len(block), time.perf_counter()
            mixed, cancel = audio.mix(block)
            if cancel and not cancelled:
                console.warn(f"the stream: {audio.CANCEL}")
            cancelled |= cancel
            yield mixed
            computing += time.perf_counter() - arrived
        ended = True

    count, lags, delays, before = 0, [], [], None
    for word in recognise.recognise(model, heard(), rate):
        count, lag = count + 1, samples / rate - word.end
        if as_json:
            line = {**captions.facts(word), "latency": round(lag, 3)}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            pause = before is not None and word.start - before >= captions.PARAGRAPH
            gap = "" if before is None else "\n" if pause else " "
            print(gap + captions.marked(word, doubt), end="", flush=True)
        if not ended:
            lags.append(lag)
            delays.append(time.perf_counter() - arrived)
        before = word.end
    if before is not None and not as_json:
        print()
    if not samples:
        raise files.TrainError("standard input ended before a sample came; is audio piped into it?")
    seconds = samples / rate
    print(f"{seconds:.1f} s, {count} words", end="", file=sys.stderr)
    if lags:
        print(
            f"; {len(lags)} became final before the end of the stream, from the end of a word to "
            f"its printing: {statistics.median(lags):.2f} s of audio "
            f"in the median, {max(lags):.2f} s at most, of which "
            f"{recognise.look_ahead(model):.2f} s are what the model must hear after it; "
            f"and {1e3 * statistics.median(delays):.0f} ms of computing, "
            f"{1e3 * max(delays):.0f} ms at most; {computing / seconds:.3f} s a second",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    return 0
