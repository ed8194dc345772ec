"""The blocks of convolutional VQGANs (taming-transformers and those that follow it), named as in their checkpoints.

All take and give float32 [B,C,H,W].
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

GROUPS = 32


def make_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def make_conv(channels: int, width: int) -> nn.Conv2d:
    """3 x 3, the same size."""
    return nn.Conv2d(channels, width, 3, padding=1)


class Residual(nn.Module):
    """Norm, swish, convolution, twice, beside the input or its 1 x 1 projection."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = make_norm(channels)
        self.conv1 = make_conv(channels, width)
        self.norm2 = make_norm(width)
        self.conv2 = make_conv(width, width)
        self.nin_shortcut = nn.Conv2d(channels, width, 1) if channels != width else None

    def forward(self, features: Tensor) -> Tensor:
        inner: Tensor = self.conv1(silu(self.norm1(features)))
        inner = self.conv2(silu(self.norm2(inner)))
        return inner + (features if self.nin_shortcut is None else self.nin_shortcut(features))


class Attention(nn.Module):
    """Residual attention of one head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = make_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        normalised = self.norm(features)
        queries = self.q(normalised).flatten(2).transpose(1, 2) * features.shape[1] ** -0.5
        weights = torch.softmax(queries @ self.k(normalised).flatten(2), -1)
        attended = self.v(normalised).flatten(2) @ weights.transpose(1, 2)
        change: Tensor = self.proj_out(attended.reshape(features.shape))
        return features + change


class Downsample(nn.Module):
    """Half the size; the zeros that a 3 x 3 of stride 2 needs lie right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        halved: Tensor = self.conv(pad(features, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Twice the size: each pixel repeated, then smoothed by a 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = make_conv(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        doubled: Tensor = self.conv(interpolate(features, scale_factor=2.0, mode="nearest"))
        return doubled


class Level(nn.Module):
    """The residual blocks of one size, each followed by attention where the level has it, then the change of size, if any.

    `widths`: of the input and behind each block. `blocks`: what the checkpoints call the list of blocks.
    """

    def __init__(self, widths: Sequence[int], attention: bool, resize: Downsample | Upsample | None, blocks: str) -> None:
        super().__init__()
        self.blocks = blocks
        self.add_module(blocks, nn.ModuleList(Residual(channels, width) for channels, width in pairwise(widths)))
        self.attn = nn.ModuleList(Attention(width) for width in widths[1:] if attention)
        self.downsample = resize if isinstance(resize, Downsample) else None
        self.upsample = resize if isinstance(resize, Upsample) else None

    def forward(self, features: Tensor) -> Tensor:
        for index, block in enumerate(self.get_submodule(self.blocks).children()):
            features = block(features)
            if len(self.attn):
                features = self.attn[index](features)
        for resize in (self.downsample, self.upsample):
            features = features if resize is None else resize(features)
        return features
