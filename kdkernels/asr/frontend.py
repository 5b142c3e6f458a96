"""The front end of a stream: blocks of samples of any rate -> normalised log-mel frames.

Each step is a generator over a stream. It works on windows that overlap by exactly what it reads on
either side, and hands on what lies between: what comes out is what one pass over the whole
recording would give, there are no seams, and memory does not grow with the recording.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from . import audio, features

# A frame is normalised by the mean and variance of the speech around it, BEFORE frames back and
# AFTER ahead, but not across a pause, after which another may speak. Pauses do not count, and the
# encoder gets silence for them: there were none in training, and noise that is scaled to the
# variance of speech reads as speech.
BEFORE, AFTER = 3000, 60  # feature frames
# Sure speech: within NEAR frames of one whose power is less than QUIET below the peak of the BEFORE
# frames before it and the PEAK after.
PEAK, NEAR = 30, 10
QUIET = 4.0  # nats, 17 dB
# Where nobody has spoken for that long, the peak is the noise's own. But speech stands out from its
# pauses, and noise from nothing: sure speech is also RISE above the noise floor, the quietest CALM
# of those frames, and so are SPOKEN frames among them.
RISE, CALM, SPOKEN = 2.0, 25, 40  # nats; frames
# Until anything has stood out, the first OPENING frames of a stream count as speech if they have
# more power than NOTHING.
OPENING, NOTHING = 500, -11.0  # frames; nats, of which digital silence has -12.4
# The last ENOUGH frames of speech normalise what comes, until there are as many new ones.
ENOUGH = 50
# A pause: more than GAP frames in which nothing stands out, less the TAIL after what did.
GAP, TAIL = 30, 5


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
    mono = (torch.from_numpy(b if b.ndim == 1 else audio.mix(b)[0]) for b in blocks)
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


def above_floor(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """float32 [frames, MELS] -> [frames, MELS + 1]; the last column is 1 where a frame stands out
    from the noise floor, else 0."""
    for window, first, _ in overlapping(frames, BEFORE + CALM, 0):
        power = window.logsumexp(1)
        calm = nn.functional.pad(power, (CALM - 1, 0), value=math.inf).unfold(0, CALM, 1).mean(1)
        padded = nn.functional.pad(-calm, (BEFORE, 0), value=-math.inf)
        floor = -nn.functional.max_pool1d(padded[None, first:], BEFORE + 1, 1)[0]
        above = power[first:] > floor + RISE
        yield torch.cat([window[first:], above[:, None].float()], 1)


def voice_activity(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """float32 [frames, MELS] -> [frames, MELS + 2]; the last two columns are 1 where there is sure
    speech and where there may be speech, else 0.

    Sure speech is near the peak power, where enough has stood out lately or nothing ever has. What
    may be speech stands out from its pauses, or comes before anything did.
    """
    spoken, opening = False, OPENING
    for window, first, count in overlapping(above_floor(frames), BEFORE, PEAK):
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
    """What may be speech, bool [frames] -> which frames are in no pause, bool [frames]; and, for
    each frame, where the last pause before it ended and where the next one ends."""
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
    """float32 [frames, MELS] -> [frames, MELS + 1], normalised to mean 0 and variance 1 in the
    speech around a frame, from one pause to the next; the last column is 0 in a pause, else 1.

    Where that is too little speech, what came before it makes up for the rest.
    """
    held = torch.zeros(1, 1), torch.zeros(1, 2 * features.MELS)
    left = BEFORE + max(NEAR, GAP + TAIL)
    for window, first, count in overlapping(voice_activity(frames), left, AFTER + NEAR):
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
