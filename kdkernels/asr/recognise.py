"""Audio of any length -> words, with times and confidences, as they become final.

    blocks of samples -> 16 kHz -> log-mel energies -> normalised -> logits -> words

Each arrow is a generator over a stream. It works on windows that overlap by exactly what it reads
on either side, and hands on what lies between: what comes out is what one pass over the whole
recording would give, there is no seam to mend, and memory does not grow with the recording. A file
in blocks of 20 seconds and a microphone in blocks of a tenth therefore give the same words.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import kdkernels as kd

from . import audio, decode, features
from .captions import Word
from .data import Alphabet
from .files import TrainError
from .model import STACK, Encoder, read_encoder

# Frames are normalised over those around them that hold speech, back to the last pause, after which
# another may speak. Pauses do not count, and are silence to the encoder: in training there were
# none, and noise that is brought to the variance of speech reads as speech.
BEFORE, AFTER = 3000, 60  # feature frames around one, whose mean and variance normalise it
PEAK, NEAR = 30, 10  # speech: within NEAR frames of one whose power is less than QUIET below
QUIET = 4.0  # the peak of the BEFORE frames before it and the PEAK after; nats, 17 dB
# Where nobody has spoken for so long, that peak is the noise's own. But speech stands out from its
# pauses, noise from nothing: frames of speech are, besides, RISE above the quietest CALM of those,
# as SPOKEN others are. A stream's first frames are taken for speech as long as nothing has stood
# out: OPENING of them at most, those that hold more than NOTHING. The last ENOUGH frames of speech
# normalise what comes until there are as many new ones.
RISE, CALM, SPOKEN, ENOUGH = 2.0, 25, 40, 50  # nats; frames
OPENING, NOTHING = 500, -11.0  # frames; nats, digital silence has -12.4
# A pause: more than GAP frames in which nothing stands out, but for the TAIL after what did.
GAP, TAIL = 30, 5
# A network is sure of a letter only some way into it, and of a word's last one only when the next
# sound has begun: seconds by which labels are late, found with benchmarks/word_times.py on the dev
# voices. Their difference is one frame, so that words do not overlap: a space takes a frame.
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

    By how much they come later, what the encoder reads after a frame, the frames that normalise,
    half a window of the spectrum.
    """
    window = features.FFT / audio.SAMPLE_RATE
    encoder = recogniser.encoder
    frames = (encoder.future + encoder.chunk) * STACK - 1 + AFTER + NEAR + PEAK
    return recogniser.shift + frames / features.FRAMES_PER_SECOND + window / 2


def overlapping(
    pieces: Iterable[Tensor], left: int, right: int, unit: int = 1
) -> Iterator[tuple[Tensor, int, int]]:
    """Windows over a stream of rows, cut anywhere: yields (window, first, count).

    Rows [first, first + count) of the windows, one after another, are the stream. Around them stand
    `left` rows before and `right` after, but for the stream's own ends. `first` and, except at the
    end, `count` are multiples of `unit`, as `left` must be.
    """
    held, first = None, 0
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece])
        count = (len(held) - first - right) // unit * unit
        if count > 0:
            yield held, first, count
            dropped = max(0, first + count - left)
            held, first = held[dropped:], first + count - dropped
    if held is not None and len(held) > first:
        yield held, first, len(held) - first


def resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[Tensor]:
    """float32 [samples] or [samples, channels] in [-1, 1] at `rate` -> int16 [samples], 16 kHz."""
    step, phases = (r // math.gcd(rate, audio.SAMPLE_RATE) for r in (rate, audio.SAMPLE_RATE))
    right = audio.reach(rate) + 1
    left = step * math.ceil(right / step)
    mono = (torch.from_numpy(b if b.ndim == 1 else b.mean(1)) for b in blocks)
    for window, first, count in overlapping(mono, left, right, step):
        samples = audio.resample(window.numpy(), rate)
        start, size = first // step * phases, math.ceil(count / step * phases)
        yield torch.from_numpy(audio.to_int16(samples[start : start + size]))


def energies(samples: Iterable[Tensor]) -> Iterator[Tensor]:
    """int16 [samples] -> float32 [frames, MELS]."""
    hop = features.HOP
    left = hop * math.ceil(features.FFT / hop)  # a window is never shorter than a spectrum
    for window, first, count in overlapping(samples, left, features.FFT // 2, hop):
        rows = features.log_energies(window)[first // hop :]
        at_end = first + count == len(window)  # where one row more than count // hop begins
        yield rows if at_end else rows[: count // hop]


def outstanding(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """float32 [frames, MELS] -> [frames, MELS + 1]: the last is 1 where one stands out, else 0."""
    for window, first, _ in overlapping(frames, BEFORE + CALM, 0):
        power = window.logsumexp(1)
        calm = nn.functional.pad(power, (CALM - 1, 0), value=math.inf).unfold(0, CALM, 1).mean(1)
        padded = nn.functional.pad(-calm, (BEFORE, 0), value=-math.inf)
        floor = -nn.functional.max_pool1d(padded[None, first:], BEFORE + 1, 1)[0]
        above = power[first:] > floor + RISE
        yield torch.cat([window[first:], above[:, None].float()], 1)


def loud(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """float32 [frames, MELS] -> [frames, MELS + 2]: the last are 1 where there is speech, else 0.

    Speech for sure, near the peak power, where anything has stood out for long or nothing ever has;
    and what may be speech, which stands out from its pauses, or comes before any did.
    """
    spoken, opening = False, OPENING
    for window, first, count in overlapping(outstanding(frames), BEFORE, PEAK):
        stop = first + count
        window, above = window[:, :-1], window[:, -1]
        power = window.logsumexp(1)
        padded = nn.functional.pad(power, (BEFORE, PEAK), value=-math.inf)
        around = padded[None, first : stop + BEFORE + PEAK]
        peak = nn.functional.max_pool1d(around, BEFORE + 1 + PEAK, 1)[0]
        near = power[first:stop] > peak - QUIET
        sums = nn.functional.pad(above.double().cumsum(0), (BEFORE + 1, 0))
        enough = (sums[BEFORE + 1 :] - sums[: -BEFORE - 1])[first:stop] >= SPOKEN
        before = torch.tensor([spoken] * count) | (enough.int().cummax(0).values > 0)
        spoken = bool(before[-1])
        above = above[first:stop] > 0
        begins = ~before & (torch.arange(count) < opening) & (power[first:stop] > NOTHING)
        opening -= count
        near &= (enough & above) | begins
        both = torch.stack([near, near | above | begins], 1)
        yield torch.cat([window[first:stop], both.float()], 1)


def turns(maybe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bool [frames], what may be speech -> where no pause is, bool [frames]; of each frame, when
    the last pause before it ended, and when the next will have."""
    count = len(maybe)
    at = torch.arange(count)
    tail = nn.functional.pad(maybe[None].float(), (TAIL, 0))
    maybe = nn.functional.max_pool1d(tail, TAIL + 1, 1)[0] > 0
    last = torch.where(maybe, at, -BEFORE).cummax(0).values
    following = torch.where(maybe, at, count).flip(0).cummin(0).values.flip(0)
    earlier = nn.functional.pad(last[:-1], (1, 0), value=-BEFORE)
    begins = maybe & (at - earlier > GAP + 1)
    begun = torch.where(begins, at, 0).cummax(0).values
    later = torch.where(begins, at, count).flip(0).cummin(0).values.flip(0)
    return following - last <= GAP + 1, begun, nn.functional.pad(later[1:], (0, 1), value=count)


def normalised(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """float32 [frames, MELS] -> [frames, MELS + 1]: of mean 0 and variance 1 in the speech around a
    frame, from one pause to the next; the last is 0 in a pause, else 1.

    Where that is too little, the speech before it makes up for what is missing.
    """
    held = torch.zeros(1, 1), torch.zeros(1, 2 * features.MELS)
    left = BEFORE + max(NEAR, GAP + TAIL)
    for window, first, count in overlapping(loud(frames), left, AFTER + NEAR):
        rows, near = window[:, :-2].double(), window[None, :, -2]
        speech = nn.functional.max_pool1d(near, 2 * NEAR + 1, 1, NEAR)[0].double()[:, None]
        sums = torch.cat([speech, speech * rows, speech * rows.square()], 1).cumsum(0)
        sums = nn.functional.pad(sums, (0, 0, 1, 0))
        at = torch.arange(first, first + count)
        heard, begun, later = (x[at] for x in turns(window[:, -1] > 0))
        low, high = (at - BEFORE).clamp(min=0), (at + AFTER + 1).clamp(max=len(window))
        low, high = torch.maximum(low, begun), torch.minimum(high, later)
        total, moments = (sums[high] - sums[low]).split([1, 2 * rows.shape[1]], 1)
        moments, held = _made_up(total, moments, held)
        mean, square = moments.chunk(2, 1)
        spread = (square - mean.square()).clamp(min=0).sqrt() + 1e-3
        scaled = (rows[first : first + count] - mean) / spread
        yield torch.cat([scaled.float(), heard[:, None].float()], 1)


def _made_up(total: Tensor, sums: Tensor, held: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
    """(means of `sums` over `total` rows, held). Where these are fewer than ENOUGH, and than there
    have been, the latest means over so many make up for those that lack; `held`: rows, means."""
    total = torch.cat([held[0], total])
    own = torch.cat([held[1], sums / total[1:].clamp(min=1)])
    most = total.cummax(0).values.clamp(min=1, max=ENOUGH)
    at = torch.arange(len(own))
    latest = torch.where((total >= most)[:, 0], at, 0).cummax(0).values
    means = own + (1 - total / most).clamp(min=0) * (own[latest] - own)
    return means[1:], (most[-1:], own[latest[-1:]])


def logits(rows: Iterable[Tensor], encoder: Encoder) -> Iterator[Tensor]:
    """float32 [frames, MELS + 1] -> float32 [frames // STACK, C]; in a pause, blank for sure."""
    past, future, unit = (n * STACK for n in (encoder.past, encoder.future, encoder.chunk))
    for window, first, count in overlapping(rows, past, future, unit):
        heard = window[: len(window) // STACK * STACK, -1].view(-1, STACK).amax(1) > 0
        scores, _ = encoder(window[None, :, :-1], torch.tensor([len(window)]), heard[None])
        blank = torch.full_like(scores[0], -SURE)
        blank[:, 0] = 0
        scores = torch.where(heard[:, None], scores[0], blank)
        yield scores[first // STACK : (first + count) // STACK]


def align(scores: Tensor, text: str, recogniser: Recogniser, start: float = 0.0) -> list[Word]:
    """When the words of `text` are said in the logits `scores` [T, C], which begin at `start` s.

    `text` may be what was recognised or a transcript that is known. Empty where it cannot be
    aligned: more labels than frames.
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

    Right words from wrong ones it tells better than the probabilities of the path's frames do.
    (Occupancies, as of ctc_posteriors, say where a given text is, not whether.)
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
        text = decode.greedy(scores[None], torch.tensor([len(scores)]), alphabet)[0]
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
    return logits(normalised(energies(resampled(blocks, rate))), recogniser.encoder)


@torch.inference_mode()
def recognise(recogniser: Recogniser, blocks: Iterable[np.ndarray], rate: int) -> Iterator[Word]:
    """As `frames` -> words.

    A word comes out as soon as the blocks that were read decide it, see `look_ahead`.
    """
    yield from words(frames(recogniser, blocks, rate), recogniser)
