"""Log-mel features, normalised over the utterance; SpecAugment."""

from functools import cache

import torch
from torch import Tensor

from .audio import SAMPLE_RATE

MELS = 40
HOP = SAMPLE_RATE // 100  # 10 ms
WINDOW = SAMPLE_RATE // 40  # 25 ms
FFT = 512
FRAMES_PER_SECOND = SAMPLE_RATE / HOP


@cache
def mel_filters() -> Tensor:
    """[FFT // 2 + 1, MELS]: triangles, equally wide in mel, from 60 Hz to 7600 Hz."""

    def mel(hertz):
        return 2595 * torch.log10(1 + hertz / 700)

    edges = torch.linspace(*mel(torch.tensor([60.0, 7600.0])).tolist(), MELS + 2)
    bins = mel(torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1))[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


@cache
def _window() -> Tensor:
    return torch.hann_window(WINDOW)


def log_energies(samples: Tensor) -> Tensor:
    """int16 [samples] at 16 kHz -> float32 [1 + samples // HOP, MELS], not normalised.

    Row t belongs to sample t * HOP and reads WINDOW // 2 samples on either side.
    """
    audio = samples.float() / 32768
    audio = torch.nn.functional.pad(audio, (0, max(0, FFT - len(audio))))
    spectrum = torch.stft(audio, FFT, HOP, WINDOW, _window(), return_complex=True)
    energy = spectrum.abs().square().T @ mel_filters()
    return (energy + 1e-7).log()


def log_mel(samples: Tensor) -> Tensor:
    """int16 [samples] at 16 kHz -> float16 [frames, MELS], mean 0 and variance 1 in each band."""
    features = log_energies(samples)
    features = (features - features.mean(0)) / (features.std(0, correction=0) + 1e-3)
    return features.half()


def silent(features: Tensor) -> bool:
    """Whether these are the features of a recording in which nothing changes."""
    return features.abs().max().item() < 0.02


def spec_augment(
    features: Tensor, lengths: Tensor, generator: torch.Generator, ids: Tensor | None = None
) -> Tensor:
    """Hide two bands of up to 8 mels and two spans of up to 12 frames, drawn for each utterance.

    `features` [N, frames, MELS], `lengths` [N] (Park et al. 2019). Hidden values become 0, which is
    the mean. `ids` [N]: positions in the whole step, of which this may be a part: what is hidden
    depends on these, not on how the step is divided.
    """
    N, frames, mels = features.shape
    ids = torch.arange(N) if ids is None else ids
    drawn = torch.rand(int(ids.max()) + 1, 4, 2, generator=generator)[ids]
    for i, (widest, size) in enumerate(2 * [(8, torch.full((N,), mels)), (12, lengths)]):
        width = (drawn[:, i, 0] * (widest + 1)).floor()
        start = (drawn[:, i, 1] * (size - width).clamp(min=0)).floor()
        position = torch.arange(frames if i % 2 else mels)
        hidden = (position >= start[:, None]) & (position < (start + width)[:, None])
        features = features.masked_fill(hidden[:, :, None] if i % 2 else hidden[:, None, :], 0)
    return features
