"""`python -m kdkernels.transcribe`: recordings, or a stream, to text and captions.

    AUDIO...    NAME.txt, NAME.json, NAME.vtt and NAME.srt beside each recording, or in --out
    --stream    words of what comes in on standard input, printed as they become final
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

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
        default=0.5,
        metavar="P",
        help=f"words of a confidence below P are marked {captions.DOUBTFUL}; 0 marks none [0.5]",
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


def transcribe(path: Path, outputs: list[Path], model: recognise.Recogniser, doubt: float) -> int:
    """Write text, JSON, WebVTT and SRT of one recording; returns how many captions are too fast."""
    with soundfile_length(path) as bar:
        pairs = blocks(path)
        head = next(pairs, None)
        if head is None:
            raise files.TrainError(f"{path} holds no audio")
        rate = head[1]

        def heard() -> Iterator[np.ndarray]:
            for block, _ in itertools.chain([head], pairs):
                bar.update(round(len(block) / rate, 1))
                yield block

        words = list(recognise.recognise(model, heard(), rate))
    shown = captions.captions(words, doubt)
    results = {
        "audio": path.name,
        "kdkernels": kd.__version__,
        "text": " ".join(word.text for word in words),
        "words": [word_facts(word) for word in words],
        "captions": [
            {"start": c.start / 1000, "end": c.end / 1000, "lines": c.lines} for c in shown
        ],
    }
    texts = (
        text(words, doubt),
        json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        captions.webvtt(shown),
        captions.srt(shown),
    )
    for output, content in zip(outputs, texts, strict=True):
        files.write_bytes(output, content.encode())
    return sum(map(captions.too_fast, shown))
