"""The acoustic model of teacher and student: a residual convolutional encoder with a CTC head."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import files
from .features import FRAMES_PER_SECOND, MELS

STACK = 3  # feature frames in one frame of logits


class Block(nn.Module):
    """x + Linear(GELU(Conv(LayerNorm(x)))): local context, then a mix of channels."""

    def __init__(self, width: int, dilation: int, causal: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # over [N, width, 1, T], which strides make channels-last: on a CPU twice as fast as Conv1d
        self.past = 4 * dilation if causal else 0  # frames of padding, all before the first frame
        span, padding = (1, dilation), (0, 0 if causal else 2 * dilation)
        self.conv = nn.Conv2d(width, width, (1, 5), padding=padding, dilation=span)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x) * mask  # padded frames must look like the end of the tensor
        y = F.pad(y, (0, 0, self.past, 0)) if self.past else y
        y = self.conv(y.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return x + self.out(F.gelu(y))


class ChunkAttention(nn.Module):
    """x + self-attention, in which a frame sees its own chunk and `left` chunks before it."""

    HEADS = 4

    def __init__(self, width: int, chunk: int, left: int):
        super().__init__()
        self.chunk, self.left = chunk, left
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        N, T, width = x.shape
        chunk = torch.arange(T, device=x.device) // self.chunk
        age = chunk[:, None] - chunk
        seen = (age >= 0) & (age <= self.left)
        heads = self.qkv(self.norm(x)).view(N, T, 3, self.HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads[0], heads[1], heads[2]
        # a padded frame must attend to something, no matter what: itself
        frame = torch.arange(T, device=x.device)
        seen = seen & (mask[:, None, None, :, 0] | (frame[:, None] == frame))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return x + self.out(y.transpose(1, 2).reshape(N, T, width))


class Encoder(nn.Module):
    """Features [N, frames, MELS] -> (logits [N, T, C], lengths [N]); T = frames // STACK."""

    frames_per_second = FRAMES_PER_SECOND / STACK

    def __init__(
        self,
        width: int,
        layers: int,
        classes: int,
        chunk: int | None = None,
        left: int = 0,
        shift: int = 0,
    ):
        """`chunk`: a streaming encoder, causal but for attention within chunks of that many frames
        of logits and `left` chunks before; None: an encoder that sees both sides of a frame.
        `shift`: frames by which its labels are trained to come late."""
        super().__init__()
        self.shape = [width, layers, classes, *([] if chunk is None else [chunk, left, shift])]
        self.shift = shift
        self.stem = nn.Linear(STACK * MELS, width)
        self.blocks = nn.ModuleList()
        for i in range(layers):
            self.blocks.append(Block(width, 1 + i % 2, chunk is not None))
            if chunk is not None and i % 2:
                self.blocks.append(ChunkAttention(width, chunk, left))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        # Frames that a frame of logits reads: `past` before it, in whole chunks; `future` after it,
        # or after the last of its chunk.
        self.chunk = chunk or 1
        past, self.future = (sum(2 * (1 + i % 2) for i in range(layers)) for _ in range(2))
        if chunk is not None:
            past, self.future = 2 * past + layers // 2 * ((left + 1) * chunk - 1), 0
        self.past = -(-past // self.chunk) * self.chunk

    def forward(
        self, features: Tensor, lengths: Tensor, heard: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`heard`, bool [N, T]: frames where it is False count as if they lay past the end."""
        N, frames, _ = features.shape
        lengths = lengths // STACK
        T = frames // STACK
        x = self.stem(features[:, : T * STACK].reshape(N, T, STACK * MELS))
        mask = torch.arange(T, device=x.device) < lengths[:, None]
        mask = (mask if heard is None else mask & heard)[..., None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x)), lengths

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def read_encoder(path: Path, whose: str = "") -> tuple[Encoder, str]:
    """The encoder in a file of `python -m kdkernels.train`, and the alphabet it writes in.

    `whose` begins the message, e.g. "the teacher ". Raises TrainError where there is none.
    """
    try:
        tensors, facts = files.read_tensors(path)
        encoder = Encoder(*facts["shape"])
        encoder.load_state_dict(tensors)
        alphabet, classes = facts["alphabet"], encoder.head.out_features
    except (OSError, ValueError, RuntimeError) as error:
        raise files.TrainError(f"{whose}{path} cannot be read as a model ({error})") from error
    except (KeyError, TypeError) as error:
        raise files.TrainError(
            f"{whose}{path} is not a model of `python -m kdkernels.train` (its header has no "
            f"{error})"
        ) from error
    if classes != 1 + len(alphabet):
        raise files.TrainError(
            f"{whose}{path} says no characters but {classes} codes of the self-supervised stage; "
            "take a teacher or a student"
        )
    return encoder, alphabet
