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
    """int16 [samples] at 16 kHz -> float32 [1 + samples // HOP, MELS], as loud as they are.

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


def spec_augment(features: Tensor, generator: torch.Generator) -> Tensor:
    """Hide two bands of up to 8 mels and two spans of up to 12 frames, others in each utterance.

    `features` [N, frames, MELS] (Park et al. 2019). Hidden values become 0, which is the mean.
    """
    N, frames, mels = features.shape
    for size, widest, axis in ((mels, 8, 2), (frames, 12, 1)):
        for _ in range(2):
            width, start = torch.rand(2, N, 1, generator=generator)
            width = (width * (widest + 1)).floor()
            start = (start * (size - width).clamp(min=0)).floor()
            position = torch.arange(size)
            hidden = (position >= start) & (position < start + width)
            hidden = hidden[:, None, :] if axis == 2 else hidden[:, :, None]
            features = features.masked_fill(hidden.to(features.device), 0)
    return features
