"""The acoustic model of teacher and student: a residual convolutional encoder with a CTC head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import FRAMES_PER_SECOND, MELS

STACK = 3  # feature frames in one frame of logits


class Block(nn.Module):
    """x + Linear(GELU(Conv(LayerNorm(x)))): local context, then a mix of channels."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # over [N, width, 1, T], which strides make channels-last: on a CPU twice as fast as Conv1d
        span, padding = (1, dilation), (0, 2 * dilation)
        self.conv = nn.Conv2d(width, width, (1, 5), padding=padding, dilation=span)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x) * mask  # padding must look the same as the end of the tensor
        y = self.conv(y.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return x + self.out(F.gelu(y))


class Encoder(nn.Module):
    """Features [N, frames, MELS] -> (logits [N, T, C], lengths [N]); T = frames // STACK."""

    frames_per_second = FRAMES_PER_SECOND / STACK

    def __init__(self, width: int, layers: int, classes: int):
        super().__init__()
        self.shape = [width, layers, classes]
        self.stem = nn.Linear(STACK * MELS, width)
        self.blocks = nn.ModuleList(Block(width, 1 + i % 2) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        N, frames, _ = features.shape
        lengths = lengths // STACK
        T = frames // STACK
        x = self.stem(features[:, : T * STACK].reshape(N, T, STACK * MELS))
        mask = (torch.arange(T, device=x.device) < lengths[:, None])[..., None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x)), lengths

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
