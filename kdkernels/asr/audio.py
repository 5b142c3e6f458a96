"""Audio: reading, resampling, noise and reverberation. Internally int16, mono, 16 kHz."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from .files import TrainError

SAMPLE_RATE = 16000
RATES = (1000, 768000)  # Hz, of a recording: least and greatest
CANCELLED = 0.1  # of the power that the loudest channel alone gives the mean
CANCEL = "its channels cancel each other, as in opposite phase; where they do, only one is heard"
FILTERS = 2**19  # filter taps that `resample` makes and applies at once


def check(
    path: Path, where: str, start: float = 0.0, end: float | None = None, promise: str = ""
) -> float:
    """Seconds of an audio file. Raises TrainError unless it exists, is audio, is complete, reaches
    `end`, as `promise` says, and has a sample before that. `where`, in the message, names the
    manifest's line.

    Reads the header and the last sample; where samples may be infinite or NaN, all from `start`.
    """
    if not path.exists():
        raise TrainError(f"{where}: there is no file {path}; fix its path or remove the line")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise TrainError(
            f"{where}: {path} cannot be read as audio ({error}); replace it or remove the line"
        ) from error
    with file:
        if file.frames <= 0:
            raise TrainError(f"{where}: {path} holds no audio; replace it or remove the line")
        if not RATES[0] <= file.samplerate <= RATES[1]:
            raise TrainError(
                f"{where}: {path} has {file.samplerate} samples a second, expected one of "
                f"{RATES[0]} to {RATES[1]}; replace it or remove the line"
            )
        seconds = file.frames / file.samplerate
        try:
            file.seek(file.frames - 1)
            whole = len(file.read(1)) == 1 and not cut_short(path)
        except soundfile.SoundFileError:  # a flac whose last frame is missing
            whole = False
        if not whole:
            raise TrainError(
                f"{where}: {path} is truncated: its header promises more; replace it or remove the "
                "line"
            )
        if end is not None and clearly_shorter(seconds, end):
            raise TrainError(
                f"{where}: {path} has {seconds:.1f} s, but {promise}; replace it or fix the line"
            )
        if span(file, start, end)[1] < 1:
            raise TrainError(
                f"{where}: {path} has no sample between {start:g} s and {end:g} s; fix the line"
            )
        if not finite(file, start, end):
            raise TrainError(
                f"{where}: {path} holds samples that are not numbers; replace it or remove the line"
            )
    return seconds


def clearly_shorter(seconds: float, others: float) -> bool:
    """Whether by more than the rounding of a time in a manifest."""
    return seconds < 0.95 * others - 0.1


def span(file: soundfile.SoundFile, start: float, end: float | None) -> tuple[int, int]:
    """(first sample, number of samples) between two times, in seconds, as far as the file goes."""
    first = min(round(start * file.samplerate), file.frames)
    left = file.frames - first
    return first, left if end is None else min(left, round((end - start) * file.samplerate))


def finite(file: soundfile.SoundFile, start: float = 0.0, end: float | None = None) -> bool:
    """Whether every sample between two times, in seconds, is a number."""
    if file.subtype not in ("FLOAT", "DOUBLE"):
        return True
    first, count = span(file, start, end)
    file.seek(first)
    blocks = file.blocks(1 << 16, frames=count, dtype="float32")
    return all(np.isfinite(block).all() for block in blocks)


def cut_short(path: Path) -> int:
    """Bytes that a RIFF or AIFF file lacks of what its header says; libsndfile reads what there is
    all the same."""
    with open(path, "rb") as file:
        header = file.read(8)
    if header[:4] not in (b"RIFF", b"FORM"):
        return 0
    size = int.from_bytes(header[4:], "little" if header[:4] == b"RIFF" else "big")
    streamed = size in (0, 0xFFFFFFFF)
    return 0 if streamed else max(0, size + 8 - path.stat().st_size)


def lacking(path: Path, file: soundfile.SoundFile, samples: int) -> float:
    """How many samples are missing, of a file of which so many could be read; nan: some.

    0 where none is known to be: not every format says how many there should be.
    """
    if cut := cut_short(path):
        return samples * cut / path.stat().st_size
    if file.format == "MP3" and not _has_count(path):
        return 0
    if file.format == "OGG" and samples >= file.frames and not _has_last_page(path):
        return math.nan
    return max(0, file.frames - samples)


def _has_count(path: Path) -> bool:
    """Whether an mp3 says how many frames it has; libsndfile guesses otherwise."""
    with open(path, "rb") as file:
        header = file.read(10)
        if header[:3] == b"ID3":  # a tag before the first frame; seven bits of its size in a byte
            file.seek(10 + sum(byte << 7 * i for i, byte in enumerate(header[:5:-1])))
        frame = header + file.read(2000)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _has_last_page(path: Path) -> bool:
    """Whether the last page of an ogg is marked as such."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # a page is half of that at most
        header = file.read().rpartition(b"OggS")[2]
    return len(header) > 1 and bool(header[1] & 4)


def check_header(file) -> None:
    """Raises OSError or ValueError unless `file`, a path or a binary file, is audio."""
    try:
        with soundfile.SoundFile(file) as opened:
            if opened.frames <= 0:
                raise ValueError("no audio in it")
            if not finite(opened):
                raise ValueError("samples that are not numbers")
    except soundfile.SoundFileError as error:
        raise ValueError(f"cannot be read as audio ({error})") from error


def decode(file, start: float = 0.0, stop: float | None = None) -> tuple[np.ndarray, int]:
    """(float32 [samples, channels], rate) of a path or binary file, from start to stop seconds.

    Raises OSError or ValueError where it is not audio or is damaged.
    """
    try:
        with soundfile.SoundFile(file) as opened:
            first, count = span(opened, start, stop)
            opened.seek(first)
            samples = opened.read(count, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"cannot be read as audio ({error})") from error
    if len(samples) < count:
        raise ValueError(f"is damaged: of {count} samples {len(samples)} can be read")
    return samples, opened.samplerate


def mono(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 [samples, channels] at `rate` -> int16 [samples] at 16 kHz.

    A recording that exceeds [-1, 1] is scaled as a whole: features do not depend on loudness.
    """
    mixed, _ = mix(samples)
    return to_int16(resample(mixed / np.abs(mixed).max(initial=1.0), rate))


def mix(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """float32 [samples, channels] -> ([samples], whether the channels cancel each other).

    The mean; where hardly anything is left of it, as of two channels in opposite phase, the first
    of the loud channels.
    """
    mean = samples.mean(1)
    power = np.einsum("tc,tc->c", samples, samples)
    cancel = bool(mean @ mean < CANCELLED * power.max() / len(power) ** 2)
    return (samples[:, np.argmax(power > power.max() / 2)] if cancel else mean), cancel


def to_int16(samples: np.ndarray) -> np.ndarray:
    """float [samples] in [-1, 1] -> int16."""
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)


def resample(samples: np.ndarray, rate: int, new_rate: int = SAMPLE_RATE) -> np.ndarray:
    """float32 [samples] at `rate` -> float32 at `new_rate`: windowed sinc, 6 zero crossings.

    Exact at any two rates; where they share hardly a factor, a few filters at a time.
    """
    if rate == new_rate:
        return samples
    step, phases = (r // math.gcd(rate, new_rate) for r in (rate, new_rate))
    together = phases if step * phases <= FILTERS else 64
    width = reach(rate, new_rate)
    padded = F.pad(torch.from_numpy(samples), (width, width + step))
    rounds = len(samples) // step + 1
    out = torch.empty(rounds, phases)
    for first in range(0, phases, together):
        stop, base = min(first + together, phases), first * step // phases
        kernel = _sinc(step, phases, first, stop)
        heard = padded[None, None, base:]
        out[:, first:stop] = F.conv1d(heard, kernel, stride=step)[0].T[:rounds]
    return out.reshape(-1)[: math.ceil(len(samples) * phases / step)].numpy()


def reach(rate: int, new_rate: int = SAMPLE_RATE) -> int:
    """Samples that `resample` reads on either side of each."""
    return math.ceil(6 / _cutoff(rate, new_rate))


def _cutoff(rate: int, new_rate: int) -> float:
    """Cut-off of the low-pass filter; 1 is half of `rate`."""
    return 0.97 * min(1.0, new_rate / rate)


@lru_cache(maxsize=4)
def _sinc(step: int, phases: int, first: int, stop: int) -> Tensor:
    """Low-pass filters [stop - first, 1, samples] for outputs `first` to `stop`, which are
    `step` / `phases` inputs apart."""
    cutoff, width = _cutoff(step, phases), reach(step, phases)
    base = first * step // phases
    position = torch.arange(-width, -(-stop * step // phases) - base + width, dtype=torch.float64)
    offset = (torch.arange(first, stop)[:, None] * step - base * phases) / phases
    t = (position - offset) * cutoff
    window = torch.where(t.abs() < 6, torch.cos(t * torch.pi / 12) ** 2, 0.0)
    return (cutoff * torch.sinc(t) * window).float()[:, None]


def reverberate(samples: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a room: a direct path and a tail of noise that falls 60 dB in `seconds`."""
    tail = int(seconds * SAMPLE_RATE)
    decay = np.exp(-6.9 * np.arange(tail) / tail)
    room = 0.1 * rng.standard_normal(tail, np.float32) * decay.astype(np.float32)
    room[0] = 1.0
    size = 1 << (len(samples) + tail - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(room, size), size)
    return wet[: len(samples)].astype(np.float32)


def add_noise(samples: np.ndarray, snr: float, colour: float, rng) -> np.ndarray:
    """Add noise `snr` dB below the speech, its power falling as 1 / frequency**colour."""
    size = 1 << (len(samples) - 1).bit_length()
    half = size // 2 + 1
    spectrum = rng.standard_normal(2 * half, np.float32).view(np.complex64)
    spectrum *= np.maximum(np.arange(half, dtype=np.float32), 8) ** (-colour / 2)
    noise = np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)
    gain = np.sqrt((samples**2).mean() / (noise**2).mean()) * 10 ** (-snr / 20)
    return samples + gain * noise
