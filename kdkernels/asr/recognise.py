"""Audio of any length -> words, with times and confidences, as they become final.

    blocks of samples -> 16 kHz -> log-mel energies -> normalised -> logits -> words
    |------------------------ frontend.py -----------------------|

Each arrow is a generator over a stream, without seams (see frontend.py): a file in blocks of 20
seconds and a microphone in blocks of a tenth of a second give the same words.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kdkernels as kd

from . import audio, decode, features, frontend
from .captions import Word
from .data import Alphabet
from .files import TrainError
from .model import STACK, Encoder, read_encoder

# A network is sure of a letter only some way into it, and of the last one of a word only when the
# next sound has begun: the seconds by which labels come late, found with benchmarks/word_times.py
# on the dev voices. They differ by one frame, which a space takes, so that words do not overlap.
START_LATE, END_LATE = 0.06, 0.03
SURE = 20.0  # nats between blank and the rest in a pause
PAUSE = 0.45  # seconds without a label that end a word
LONGEST_WORD = 10.0  # seconds: what a word may be before it is cut, to bound memory
STANDARD = "student_distilled.safetensors"  # of a run's folder


class Recogniser(NamedTuple):
    encoder: Encoder
    alphabet: Alphabet

    @property
    def frame(self) -> float:
        """Seconds of one frame of logits."""
        return 1 / self.encoder.frames_per_second

    @property
    def shift(self) -> float:
        """Seconds by which a streaming encoder's labels come later than another's."""
        return self.encoder.shift * self.frame


def load(path: Path) -> Recogniser:
    """A model that `python -m kdkernels.train` wrote; of its folder, the distilled student.

    Raises:
        TrainError: there is none, or it cannot be read.
    """
    file = path / STANDARD if path.is_dir() else path
    if not file.is_file():
        seeds = sorted(path.glob(f"seed-*/{STANDARD}"))
        raise TrainError(
            f"there is no model {file}; give "
            + (
                f"the folder of one seed, such as {seeds[0].parent}"
                if seeds
                else "a folder or a .safetensors that `python -m kdkernels.train` wrote"
            )
        )
    encoder, alphabet = read_encoder(file)
    return Recogniser(encoder.eval(), Alphabet(alphabet))


def look_ahead(recogniser: Recogniser) -> float:
    """Seconds of audio after the end of a word that must be heard before its frames are known.

    The sum of the delay of its labels, what the encoder reads after a frame, the later frames that
    normalise it, and half a window of the spectrum.
    """
    window = features.FFT / audio.SAMPLE_RATE
    encoder = recogniser.encoder
    frames = (encoder.future + encoder.chunk) * STACK - 1 + frontend.AFTER
    frames += frontend.NEAR + frontend.PEAK
    return recogniser.shift + frames / features.FRAMES_PER_SECOND + window / 2


def logits(rows: Iterable[Tensor], encoder: Encoder) -> Iterator[Tensor]:
    """float32 [frames, MELS + 1] -> float32 [frames // STACK, C]; in a pause, certainly blank."""
    past, future, unit = (n * STACK for n in (encoder.past, encoder.future, encoder.chunk))
    for window, first, count in frontend.overlapping(rows, past, future, unit):
        heard = window[: len(window) // STACK * STACK, -1].view(-1, STACK).amax(1) > 0
        scores, _ = encoder(window[None, :, :-1], torch.tensor([len(window)]), heard[None])
        blank = torch.full_like(scores[0], -SURE)
        blank[:, 0] = 0
        scores = torch.where(heard[:, None], scores[0], blank)
        yield scores[first // STACK : (first + count) // STACK]


def align(scores: Tensor, text: str, recogniser: Recogniser, start: float = 0.0) -> list[Word]:
    """When the words of `text` are said in the logits `scores` [T, C], which begin at `start` s.

    `text` may be what was recognised or a known transcript. Empty where it cannot be aligned: more
    labels than frames.
    """
    encoded = recogniser.alphabet.encode(text)
    path, score = kd.ctc_align(scores, encoded, len(scores), len(encoded))
    if not score.isfinite():
        return []
    start -= recogniser.shift
    words: list[Word] = []
    for letters in _runs(path.tolist(), recogniser.alphabet):
        word = "".join(character for character, _, _ in letters)
        first, stop = letters[0][1], letters[-1][2]
        words.append(
            Word(
                word,
                max(0.0, start + first * recogniser.frame - START_LATE),
                max(0.0, start + stop * recogniser.frame - END_LATE),
                _confidence(scores[first:stop], recogniser.alphabet.encode(word)),
            )
        )
    return words


def _confidence(scores: Tensor, word: Tensor) -> float:
    """The probability of `word` in its frames over all its alignments, to the power 1 / letters.

    It separates right words from wrong ones better than the probabilities of the path's frames do.
    (Occupancies, as from ctc_posteriors, say where a given text is, not whether.)
    """
    loss = kd.ctc_loss(scores, word, len(scores), len(word), reduction="sum")
    return math.exp(-loss.item() / len(word))


def _runs(path: list[int], alphabet: Alphabet) -> Iterator[list[tuple[str, int, int]]]:
    """The words of a CTC path: (character, first frame, frame after it) for each letter."""
    word: list[tuple[str, int, int]] = []
    at = 0
    for label, group in itertools.groupby(path):
        stop = at + len(list(group))
        character = alphabet.decode([label]) if label else ""
        if character.strip():
            word.append((character, at, stop))
        elif character and word:
            yield word
            word = []
        at = stop
    if word:
        yield word


def words(rows: Iterable[Tensor], recogniser: Recogniser) -> Iterator[Word]:
    """float32 [T, C] -> words, each as soon as a space or a pause ends it."""
    alphabet, frame = recogniser.alphabet, recogniser.frame
    pause, longest = round(PAUSE / frame), round(LONGEST_WORD / frame)
    held = torch.empty(0, len(alphabet))
    base = at = 0  # frames of the stream: where `held` begins, the one looked at
    first = last = None  # frames of the stream: labels of the word that is being said

    def word(stop: int) -> list[Word]:
        scores = held[first - base : stop - base]
        text = decode.greedy_one(scores, alphabet)
        return align(scores, text, recogniser, first * frame)

    for piece in rows:
        held = torch.cat([held, piece])
        for label in piece.argmax(-1).tolist():
            space = label > 0 and not alphabet.decode([label]).strip()
            if label > 0 and not space:
                first, last = at if first is None else first, at
            if first is not None and (space or at - last >= pause or at - first >= longest):
                yield from word(last + 1)
                first = None
            at += 1
        keep = at if first is None else first
        held, base = held[keep - base :], keep
    if first is not None:
        yield from word(last + 1)


def frames(recogniser: Recogniser, blocks: Iterable[np.ndarray], rate: int) -> Iterator[Tensor]:
    """float32 [samples] or [samples, channels] in [-1, 1], in blocks, at `rate` -> logits."""
    samples = frontend.resampled(blocks, rate)
    rows = frontend.normalised(frontend.energies(samples))
    return logits(rows, recogniser.encoder)


@torch.inference_mode()
def recognise(recogniser: Recogniser, blocks: Iterable[np.ndarray], rate: int) -> Iterator[Word]:
    """As `frames`, to words.

    A word comes out as soon as the blocks read so far decide it; see `look_ahead`.
    """
    yield from words(frames(recogniser, blocks, rate), recogniser)
