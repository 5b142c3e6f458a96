"""`python -m kdkernels.transcribe`: recordings, or a stream, to text and captions.

AUDIO...    NAME.txt, NAME.json, NAME.vtt and NAME.srt beside each recording, or in --out
--stream    words of what comes in on standard input, printed as they become final
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import kdkernels as kd

try:
    import numpy as np
    import soundfile
    from tqdm import tqdm

    from kdkernels.asr import audio, captions, files, recognise
except ModuleNotFoundError as error:
    if (error.name or "kdkernels").startswith("kdkernels"):
        raise
    print(
        f'error: {error.name} is missing: pip install "kdkernels[train]", '
        'or pip install -e ".[train]" in a checkout',
        file=sys.stderr,
    )
    sys.exit(2)

SUFFIXES = (".txt", ".json", ".vtt", ".srt")
BLOCK = 20.0  # seconds of a recording that are read at a time
STREAM_BLOCK = 0.1  # seconds of a stream
PARAGRAPH = 1.0  # seconds of pause that begin a new line of text
RATES = (1000, 768000)  # Hz

EPILOG = """
Exit code: 0; 1 when a recording could not be done (the others are); 2 when nothing was begun.

A microphone:  arecord -q -f S16_LE -r 16000 -c 1 | python -m kdkernels.transcribe --stream --model RUN
A film:        ffmpeg -i film.mp4 film.wav && python -m kdkernels.transcribe film.wav --model RUN
"""  # noqa: E501


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels.transcribe",
        description="Write down what is said in recordings, as text, JSON with word times and "
        "confidences, WebVTT and SRT captions; or in a stream, word by word.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="*", metavar="AUDIO", help="any format that libsndfile reads")
    add(
        "--model",
        required=True,
        metavar="RUN",
        help="output folder of python -m kdkernels.train (its student_distilled is taken), "
        "or a .safetensors file of one",
    )
    add("--out", metavar="DIR", help="folder for what is written [beside each recording]")
    add("--force", action="store_true", help="replace files that exist")
    add(
        "--doubt",
        type=float,
        default=captions.DOUBT,
        metavar="P",
        help=f"words of a confidence below P are marked {captions.DOUBTFUL}; 0 marks none "
        f"[{captions.DOUBT}]",
    )
    add(
        "--stream",
        action="store_true",
        help="read standard input (raw 16-bit little-endian samples, or wav) and print words",
    )
    add("--rate", type=int, default=16000, metavar="HZ", help="of raw samples [16000]")
    add("--channels", type=int, default=1, metavar="N", help="of raw samples [1]")
    add("--json", action="store_true", help="with --stream: a line of JSON for each word")
    chosen = parser.parse_args(arguments)
    if chosen.stream == bool(chosen.audio):
        parser.error("give recordings, or --stream and none")
    if not 0 <= chosen.doubt <= 1:
        parser.error(f"--doubt must be in [0, 1], got {chosen.doubt}")
    if not RATES[0] <= chosen.rate <= RATES[1]:
        parser.error(f"--rate must be in [{RATES[0]}, {RATES[1]}], got {chosen.rate}")
    if chosen.channels < 1:
        parser.error(f"--channels must be at least 1, got {chosen.channels}")
    return chosen


# ---- recordings ----------------------------------------------------------------------------------


def blocks(path: Path, seconds: float = BLOCK) -> Iterator[tuple[np.ndarray, int]]:
    """(float32 [samples, channels], rate) of a recording, read as they are asked for.

    Raises:
        TrainError: it cannot be read, to its end.
    """
    try:
        with soundfile.SoundFile(path) as file:
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise files.TrainError(f"{path} has {file.samplerate} samples a second")
            if audio.cut_short(path):
                raise files.TrainError(
                    f"{path} is truncated: its header promises more; "
                    f"`ffmpeg -i {path} whole.wav` mends the header"
                )
            size = math.ceil(seconds * file.samplerate)
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise files.TrainError(f"{path} holds samples that are no numbers")
                yield block, file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        reason = "there is no such file" if not path.exists() else error
        raise files.TrainError(
            f"{path} cannot be read as audio ({reason}); `ffmpeg -i {path} a.wav` may convert it"
        ) from error


def text(words: list[captions.Word], doubt: float) -> str:
    """A line for each passage without a pause."""
    lines: list[str] = []
    before = -math.inf
    for word in words:
        marked = captions.marked(word, doubt)
        if word.start - before >= PARAGRAPH:
            lines.append(marked)
        else:
            lines[-1] += " " + marked
        before = word.end
    return "".join(line + "\n" for line in lines)


def word_facts(word: captions.Word) -> dict:
    """For JSON: seconds to the millisecond."""
    times = {"start": round(word.start, 3), "end": round(word.end, 3)}
    return {"word": word.text, **times, "confidence": round(word.confidence, 4)}


def transcribe(path: Path, outputs: list[Path], model: recognise.Recogniser, doubt: float) -> str:
    """Write text, JSON, WebVTT and SRT of one recording; returns a line about them.

    Raises:
        TrainError: the recording cannot be read or the files cannot be written.
    """
    start = time.perf_counter()
    pieces = blocks(path)
    head = next(pieces, None)
    if head is None:
        raise files.TrainError(f"{path} holds no audio")
    rate, samples = head[1], 0
    columns, rows = shutil.get_terminal_size()  # 80, 24 where a terminal does not know its size
    with tqdm(
        desc=path.name, unit="s", disable=None, ncols=columns, nrows=rows, leave=False
    ) as bar:

        def heard() -> Iterator[np.ndarray]:
            nonlocal samples
            for block, _ in itertools.chain([head], pieces):
                yield block
                samples += len(block)
                bar.update(len(block) // rate)

        words = list(recognise.recognise(model, heard(), rate))
    shown = captions.captions(words, doubt)
    results = {
        "audio": path.name,
        "seconds": round(samples / rate, 3),
        "kdkernels": kd.__version__,
        "text": " ".join(word.text for word in words),
        "words": [word_facts(word) for word in words],
        "captions": [
            {"start": c.start / 1000, "end": c.end / 1000, "lines": c.lines} for c in shown
        ],
    }
    contents = (
        text(words, doubt),
        json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        captions.webvtt(shown),
        captions.srt(shown),
    )
    for output, content in zip(outputs, contents, strict=True):
        files.write_bytes(output, content.encode())
    fast = sum(map(captions.too_fast, shown))
    return (
        f"{path}: {samples / rate:.1f} s, {len(words)} words, {len(shown)} captions"
        + (f", {fast} of them faster than 20 characters a second" if fast else "")
        + f", in {time.perf_counter() - start:.1f} s"
    )


def outputs_of(paths: list[Path], out: str | None, force: bool) -> list[list[Path]]:
    """What is written for each recording; raises before the work where something would be lost."""
    written = [
        [(Path(out) if out else path.parent) / (path.stem + suffix) for suffix in SUFFIXES]
        for path in paths
    ]
    seen: dict[Path, Path] = {}
    for path, outputs in zip(paths, written, strict=True):
        other = seen.setdefault(outputs[0].resolve(), path)
        if other is not path:
            raise files.TrainError(f"{other} and {path} would both be written to {outputs[0]}")
        for output in outputs:
            if output.exists() and not force:
                raise files.TrainError(f"{output} exists; --force replaces it")
            if output.resolve() == path.resolve():
                raise files.TrainError(f"{path} would be overwritten; is it audio?")
    return written


def recordings(chosen: argparse.Namespace, model: recognise.Recogniser) -> int:
    paths = [Path(name) for name in chosen.audio]
    written = outputs_of(paths, chosen.out, chosen.force)
    if chosen.out:
        files.check_writable(Path(chosen.out))
    failed = 0
    for path, outputs in zip(paths, written, strict=True):
        try:
            print(transcribe(path, outputs, model, chosen.doubt), flush=True)
        except files.TrainError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if failed and len(paths) > 1:
        print(f"{failed} of {len(paths)} recordings could not be done", file=sys.stderr)
    return int(failed > 0)


# ---- a stream ------------------------------------------------------------------------------------


class _Rewound:
    """A stream that cannot seek, from its beginning on although `head` was read from it."""

    def __init__(self, head: bytes, rest: BinaryIO):
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._rest.read(size - len(head)) if len(head) < size else head


def stream_blocks(
    stream: BinaryIO, rate: int, channels: int, seconds: float = STREAM_BLOCK
) -> tuple[int, Iterator[np.ndarray]]:
    """(rate, float32 [samples, channels] blocks) of raw 16-bit samples, or of wav, which says so.

    Raises:
        TrainError: a wav stream that is not 16-bit PCM.
    """
    head = stream.read(4)
    source = _Rewound(head, stream)
    read = source.read
    if head == b"RIFF":
        try:
            opened = wave.open(source)  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise files.TrainError(f"the wav stream cannot be read ({error}); send PCM") from error
        rate, channels = opened.getframerate(), opened.getnchannels()
        if opened.getsampwidth() != 2:
            bits = 8 * opened.getsampwidth()
            raise files.TrainError(f"the wav stream has {bits} bits a sample; send 16")
        if not RATES[0] <= rate <= RATES[1]:
            raise files.TrainError(f"the wav stream has {rate} samples a second")

        def read(size: int) -> bytes:
            return opened.readframes(size // (2 * channels))

    size = 2 * channels * math.ceil(seconds * rate)

    def pieces() -> Iterator[np.ndarray]:
        while data := read(size):
            data = data[: len(data) // (2 * channels) * 2 * channels]  # a sample cut short
            samples = np.frombuffer(data, "<i2").reshape(-1, channels)
            yield samples.astype(np.float32) / 32768

    return rate, pieces()


def stream(chosen: argparse.Namespace, model: recognise.Recogniser, source: BinaryIO) -> int:
    """Words to standard output, a new line after a pause; latencies to standard error.

    The audio latency of a word is what was read after its end when it was printed; processing is
    the time from a block's arrival to the last word that it decided.
    """
    rate, pieces = stream_blocks(source, chosen.rate, chosen.channels)
    samples, arrived, computing = 0, time.perf_counter(), 0.0

    def heard() -> Iterator[np.ndarray]:
        nonlocal samples, arrived, computing
        for block in pieces:
            samples, arrived = samples + len(block), time.perf_counter()
            yield block
            computing += time.perf_counter() - arrived

    lags, delays, before = [], [], None
    for word in recognise.recognise(model, heard(), rate):
        lags.append(samples / rate - word.end)
        if chosen.json:
            print(
                json.dumps({**word_facts(word), "latency": round(lags[-1], 3)}, ensure_ascii=False)
            )
        else:
            pause = before is not None and word.start - before >= PARAGRAPH
            gap = "" if before is None else "\n" if pause else " "
            print(gap + captions.marked(word, chosen.doubt), end="", flush=True)
        delays.append(time.perf_counter() - arrived)
        before = word.end
    if before is not None and not chosen.json:
        print()
    seconds = samples / rate
    print(f"{seconds:.1f} s, {len(lags)} words", end="", file=sys.stderr)
    if lags:
        print(
            f"; from the end of a word to its printing: {statistics.median(lags):.2f} s of audio "
            f"in the median, {max(lags):.2f} s at most, of which "
            f"{recognise.look_ahead(model):.2f} s are what the model must hear after it; "
            f"and {1e3 * statistics.median(delays):.0f} ms of computing, "
            f"{1e3 * max(delays):.0f} ms at most; {computing / seconds:.3f} s a second",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    return 0


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        model = recognise.load(Path(chosen.model))
        if chosen.stream:
            return stream(chosen, model, sys.stdin.buffer)
        return recordings(chosen, model)
    except files.TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads the words has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
