"""VQGAN-LC: a VQGAN whose codebook of 100,000 CLIP features stays frozen behind one trained linear projector.

Zhu et al., "Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%", 2024. ImageNet at 256 x 256:

| variant | grid | encoder, decoder, 1 x 1 convolutions | multiply-adds, encoder + decoder | rFID | codes in use |
| --- | --- | --- | --- | --- | --- |
| f16 | 16 x 16 | 71.8 M | 69.4 G + 126.4 G | 2.62 | 99.9 % |
| f8 | 32 x 32 | 64.7 M | 110.8 G + 230.9 G | 1.29 | 99.5 % |

rFID and use are the authors', the other figures are counted; those of the encoder include the search. The authors' configuration
asks for attention at resolution 16, which f8 has nowhere but in its middle. The frozen table (76.8 M values) is a buffer, not a
parameter; the projector has 6,152. An export folds both into 100,000 x 8.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from export.architectures._vqgan import Attention, Downsample, Level, Residual, Upsample, make_conv, make_norm
from export.tokenizer import Tokenizer

TASK = "tokenize"
PAPER = "arXiv:2406.11837"
PREPROCESSING = {"input_size": (3, 256, 256), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
TRAINING_ONLY = ("discriminator.*", "perceptual_loss.*")


@dataclass(frozen=True)
class Variant:
    """`multipliers`: width of each level in `channels`, the finest first; each level but the last halves the size.

    `attention`: levels whose residual blocks are each followed by attention.
    """

    multipliers: tuple[int, ...]
    attention: tuple[int, ...] = ()
    channels: int = 128
    blocks: int = 2
    latent: int = 256
    codes: int = 100_000
    features: int = 768
    code_channels: int = 8


VARIANTS = {"f16": Variant((1, 1, 2, 2, 4), attention=(4,)), "f8": Variant((1, 2, 2, 4))}


def make(variant: str = "f16", **changes: Any) -> "VQGANLC":
    """One of VARIANTS, with any of its fields changed."""
    return VQGANLC(replace(VARIANTS[variant], **changes))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = Residual(width, width)
        self.attn_1 = Attention(width)
        self.block_2 = Residual(width, width)

    def forward(self, features: Tensor) -> Tensor:
        attended: Tensor = self.block_2(self.attn_1(self.block_1(features)))
        return attended


class Encoder(nn.Module):
    """Images [B,3,H,W] -> [B,latent,h,w]."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        widths = [variant.channels * factor for factor in (1, *variant.multipliers)]
        last = len(variant.multipliers) - 1
        self.conv_in = make_conv(3, variant.channels)
        self.down = nn.ModuleList(
            Level(
                [widths[level]] + [widths[level + 1]] * variant.blocks,
                level in variant.attention,
                Downsample(widths[level + 1]) if level != last else None,
                "block",
            )
            for level in range(last + 1)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = make_norm(widths[-1])
        self.conv_out = make_conv(widths[-1], variant.latent)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv_in(images)
        for level in self.down:
            features = level(features)
        latents: Tensor = self.conv_out(silu(self.norm_out(self.mid(features))))
        return latents


class Decoder(nn.Module):
    """[B,latent,h,w] -> images [B,3,H,W]. Levels are numbered as the encoder's and run from the coarsest."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        widths = [variant.channels * factor for factor in variant.multipliers]
        coarser = [*widths[1:], widths[-1]]
        self.conv_in = make_conv(variant.latent, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                [coarser[level]] + [width] * (variant.blocks + 1),
                level in variant.attention,
                Upsample(width) if level else None,
                "block",
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = make_norm(widths[0])
        self.conv_out = make_conv(widths[0], 3)

    def forward(self, features: Tensor) -> Tensor:
        features = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            features = level(features)
        images: Tensor = self.conv_out(silu(self.norm_out(features)))
        return images


class FrozenTable(nn.Module):
    """`weight` [N,features]: CLIP features that training never changes."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.zeros(rows, features))


class VQGANLC(Tokenizer):
    """Nearest by plain Euclidean distance from the projected table."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.encoder = Encoder(variant)
        self.decoder = Decoder(variant)
        self.tok_embeddings = FrozenTable(variant.codes, variant.features)
        self.codebook_projection = nn.Linear(variant.features, variant.code_channels)
        self.quant_conv = nn.Conv2d(variant.latent, variant.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(variant.code_channels, variant.latent, 1)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.quant_conv(self.encoder(images))
        return latents.unsqueeze(1)

    def codebooks(self) -> Tensor:
        projected: Tensor = self.codebook_projection(self.tok_embeddings.weight)
        return projected.unsqueeze(0)

    def decode(self, codes: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant_conv(codes.squeeze(1)))
        return images

    @torch.no_grad()
    def set_codebooks(self, codes: Tensor) -> None:
        """The table of the smallest norm that the projector maps onto `codes`."""
        inverse = torch.linalg.pinv(self.codebook_projection.weight.double())
        self.tok_embeddings.weight.copy_((codes[0] - self.codebook_projection.bias).double() @ inverse.T)
