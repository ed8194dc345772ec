"""ViT-VQGAN: a VQGAN of two plain Vision Transformers around a small codebook of unit vectors.

Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2021. The sizes are those of the open port
(thuanz123/enhancing-transformers), whose checkpoints load here; ImageNet at 256 x 256, patches of 8, 32 x 32 tokens of 8,192:

| variant | encoder, depth x width | decoder, depth x width | parameters | multiply-adds, encoder + decoder |
| --- | --- | --- | --- | --- |
| small | 8 x 512 | 8 x 512 | 50.9 M | 34.7 G + 34.5 G |
| base | 12 x 768 | 12 x 768 | 170.7 M | 106.7 G + 106.5 G |
| large | 8 x 512 | 32 x 1280 | 613.5 M | 34.7 G + 670 G |

`nano` is no published size but that of the bundled `vq-photo`: 2 x 192 and 4 x 192 (3 heads), 2.6 M parameters, 1.7 G + 3.3 G.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from export.tokenizer import Tokenizer

TASK = "tokenize"
PAPER = "arXiv:2110.04627"
LICENCE = "MIT"
PREPROCESSING = {"input_size": (3, 256, 256), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
TRAINING_ONLY = ("loss.*",)


@dataclass(frozen=True)
class Size:
    """Of one transformer; every head has 64 channels, whatever `width / heads` is."""

    depth: int
    width: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Variant:
    encoder: Size
    decoder: Size
    image_size: int = 256
    patch: int = 8
    codes: int = 8192
    code_channels: int = 32


_SMALL, _BASE, _LARGE = Size(8, 512, 8, 2048), Size(12, 768, 12, 3072), Size(32, 1280, 16, 5120)
VARIANTS = {
    "nano": Variant(Size(2, 192, 3, 640), Size(4, 192, 3, 640), code_channels=16),
    "small": Variant(_SMALL, _SMALL),
    "base": Variant(_BASE, _BASE),
    "large": Variant(_SMALL, _LARGE),
}
HEAD_CHANNELS = 64


def make(variant: str = "small", *, size: tuple[int, int, int, int] | None = None, **changes: Any) -> "ViTVQGAN":
    """One of VARIANTS, with any of its fields changed; `size` (depth, width, heads, hidden) is that of both transformers."""
    if size is not None:
        changes |= {"encoder": Size(*size), "decoder": Size(*size)}
    return ViTVQGAN(replace(VARIANTS[variant], **changes))


def position_table(width: int, side: int) -> Tensor:
    """Sines and cosines [1,side*side,width]: the first half of the channels tells the column, the second half the row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float().unsqueeze(0)


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.to_qkv = nn.Linear(size.width, 3 * size.heads * HEAD_CHANNELS, bias=False)
        self.to_out = nn.Linear(size.heads * HEAD_CHANNELS, size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, _ = tokens.shape
        queries, keys, values = self.to_qkv(tokens).view(batch, count, 3, self.heads, HEAD_CHANNELS).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(queries @ keys.transpose(2, 3) * HEAD_CHANNELS**-0.5, -1)
        mixed: Tensor = self.to_out((weights @ values).transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size.width, size.hidden), nn.Tanh(), nn.Linear(size.hidden, size.width))

    def forward(self, tokens: Tensor) -> Tensor:
        mapped: Tensor = self.net(tokens)
        return mapped


class PreNorm(nn.Module):
    """Residual around `fn` of the normalised tokens."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, tokens: Tensor) -> Tensor:
        changed: Tensor = self.fn(self.norm(tokens))
        return tokens + changed


class Transformer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        parts: tuple[Callable[[Size], nn.Module], ...] = (Attention, FeedForward)
        self.layers = nn.ModuleList(nn.ModuleList(PreNorm(size.width, part(size)) for part in parts) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer.children():
                tokens = part(tokens)
        normalised: Tensor = self.norm(tokens)
        return normalised


class Encoder(nn.Module):
    """Images [B,3,H,W] -> tokens [B,h*w,width], a patch each, in the order of reading."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        size = variant.encoder
        self.to_patch_embedding = nn.Sequential(nn.Conv2d(3, size.width, variant.patch, stride=variant.patch))
        self.en_pos_embedding = nn.Buffer(position_table(size.width, variant.image_size // variant.patch))
        self.transformer = Transformer(size)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.transformer(self.to_patch_embedding(images).flatten(2).transpose(1, 2) + self.en_pos_embedding)
        return tokens


class Decoder(nn.Module):
    """Tokens [B,h*w,width] -> images [B,3,H,W]."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        size = variant.decoder
        self.side = variant.image_size // variant.patch
        self.de_pos_embedding = nn.Buffer(position_table(size.width, self.side))
        self.transformer = Transformer(size)
        # At the index that the checkpoints have it, behind a change of layout.
        self.to_pixel = nn.Sequential(nn.Identity(), nn.ConvTranspose2d(size.width, 3, variant.patch, stride=variant.patch))

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.transformer(tokens + self.de_pos_embedding).transpose(1, 2)
        images: Tensor = self.to_pixel(features.reshape(*features.shape[:2], self.side, self.side))
        return images


class Quantizer(nn.Module):
    """The codes as they are stored, of any length; they are compared and decoded at unit length."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.embedding = nn.Embedding(variant.codes, variant.code_channels)


class ViTVQGAN(Tokenizer):
    """Nearest by angle. Pixels are 0 to 1."""

    cosine: ClassVar[bool] = True

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.side = variant.image_size // variant.patch
        self.encoder = Encoder(variant)
        self.decoder = Decoder(variant)
        self.quantizer = Quantizer(variant)
        self.pre_quant = nn.Linear(variant.encoder.width, variant.code_channels)
        self.post_quant = nn.Linear(variant.code_channels, variant.decoder.width)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.pre_quant(self.encoder(images)).transpose(1, 2)
        return latents.reshape(images.shape[0], 1, -1, self.side, self.side)

    def codebooks(self) -> Tensor:
        return normalize(self.quantizer.embedding.weight, dim=-1).unsqueeze(0)

    def decode(self, codes: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant(codes.squeeze(1).flatten(2).transpose(1, 2)))
        return images

    @torch.no_grad()
    def set_codebooks(self, codes: Tensor) -> None:
        self.quantizer.embedding.weight.copy_(codes[0])
