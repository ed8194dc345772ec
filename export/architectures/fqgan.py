"""FQGAN: a VQGAN whose codebook is split into two or three, each behind a small transformer of its own.

Bai et al., "Factorized Visual Tokenization and Generation", 2024. Each codebook has 16,384 codes of 8 channels. On ImageNet at
256 x 256:

| variant | codebooks | grid | parameters | multiply-adds, encoder + decoder | rFID |
| --- | --- | --- | --- | --- | --- |
| dual_ds16 | vis, sem | 16 x 16 | 111.3 M | 80.1 G + 126.4 G | 0.94 |
| triple_ds16 | vis, sem_mid, sem_high | 16 x 16 | 131.7 M | 85.6 G + 126.4 G | 0.76 |
| dual_ds8 | vis, sem | 32 x 32 | 110.3 M | 167.3 G + 237.4 G | 0.32 |
| triple_ds8 | vis, sem_mid, sem_high | 32 x 32 | 131.1 M | 194.4 G + 237.4 G | 0.24 |

rFID is the authors', the other figures are counted; those of the encoder include the search. Tokens come in the order of the
table's codebooks.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from export.architectures._vqgan import Attention, Downsample, Level, Residual, Upsample, make_conv, make_norm
from export.tokenizer import Tokenizer

TASK = "tokenize"
PAPER = "arXiv:2411.16681"
LICENCE = "CC-BY-NC-4.0"
PREPROCESSING = {"input_size": (3, 256, 256), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
TRAINING_ONLY = ("feat_pred_head.*", "mid_sem_feat_pred.*", "high_sem_feat_pred.*", "quantize_*.codebook_used")

HEADS = {"vis": "visual_head", "sem": "semantic_head", "sem_mid": "semantic_head_mid", "sem_high": "semantic_head_high"}


@dataclass(frozen=True)
class Variant:
    """`codebooks`: keys of HEADS, in the order in which the decoder takes them. `multipliers`: width of each level in `channels`,
    the finest first; each level but the last halves the size. `depth`, `heads`: of the transformers behind the encoder."""

    codebooks: tuple[str, ...]
    multipliers: tuple[int, ...]
    image_size: int = 256
    channels: int = 128
    blocks: int = 2
    latent: int = 256
    depth: int = 6
    heads: int = 8
    codes: int = 16384
    code_channels: int = 8

    @property
    def side(self) -> int:
        """Positions of the grid in each direction."""
        return int(self.image_size >> (len(self.multipliers) - 1))


_DUAL, _TRIPLE = ("vis", "sem"), ("vis", "sem_mid", "sem_high")
_DS16, _DS8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
VARIANTS = {
    "dual_ds16": Variant(_DUAL, _DS16),
    "triple_ds16": Variant(_TRIPLE, _DS16),
    "dual_ds8": Variant(_DUAL, _DS8),
    "triple_ds8": Variant(_TRIPLE, _DS8),
}


def make(variant: str = "dual_ds16", **changes: Any) -> "FQGAN":
    """One of VARIANTS, with any of its fields changed."""
    return FQGAN(replace(VARIANTS[variant], **changes))


def make_middle(width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width, width), Attention(width), Residual(width, width))


class SelfAttention(nn.Module):
    """Multi-head attention over tokens [B,n,width], with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        channels = width // self.heads
        projected = nn.functional.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = projected.view(batch, count, 3, self.heads, channels).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(queries @ keys.transpose(2, 3) * channels**-0.5, -1)
        mixed: Tensor = self.out_proj((weights @ values).transpose(1, 2).flatten(2))
        return mixed


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=widen, gelu=nn.GELU(), c_proj=narrow))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.ln_1(tokens))
        changed: Tensor = self.mlp(self.ln_2(tokens))
        return tokens + changed


class Adapter(nn.Module):
    """A transformer over the positions of a feature map [B,C,h,w] of a fixed size."""

    def __init__(self, width: int, variant: Variant) -> None:
        super().__init__()
        self.side = variant.side
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.side**2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Sequential(*(TransformerBlock(width, variant.heads) for _ in range(variant.depth)))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.ln_pre(features.flatten(2).transpose(1, 2) + self.positional_embedding)
        adapted: Tensor = self.ln_post(self.transformer(tokens)).transpose(1, 2)
        return adapted.reshape(features.shape)


class Encoder(nn.Module):
    """Images [B,3,H,W] -> a feature map [B,latent,h,w] for each codebook."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.codebooks = variant.codebooks
        widths = [variant.channels * factor for factor in (1, *variant.multipliers)]
        width, last = widths[-1], len(variant.multipliers) - 1
        self.conv_in = make_conv(3, variant.channels)
        self.conv_blocks = nn.Sequential(
            *(
                Level(
                    [widths[level]] + [widths[level + 1]] * variant.blocks,
                    level == last,
                    Downsample(widths[level + 1]) if level != last else None,
                    "res",
                )
                for level in range(last + 1)
            )
        )
        self.mid = make_middle(width)
        for name in variant.codebooks:
            self.add_module(HEADS[name], nn.Sequential(Adapter(width, variant)))
            self.add_module(f"norm_out_{name}", make_norm(width))
            self.add_module(f"conv_out_{name}", make_conv(width, variant.latent))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.mid(self.conv_blocks(self.conv_in(images)))
        return [self._branch(name, features) for name in self.codebooks]

    def _branch(self, name: str, features: Tensor) -> Tensor:
        adapted = self.get_submodule(HEADS[name])(features)
        latent: Tensor = self.get_submodule(f"conv_out_{name}")(silu(self.get_submodule(f"norm_out_{name}")(adapted)))
        return latent


class Decoder(nn.Module):
    """[B,latent,h,w] -> images [B,3,H,W]; the levels run from the coarsest."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        widths = [variant.channels * factor for factor in reversed(variant.multipliers)]
        last = len(widths) - 1
        self.conv_in = make_conv(variant.latent, widths[0])
        self.mid = make_middle(widths[0])
        self.conv_blocks = nn.Sequential(
            *(
                Level(
                    [widths[max(level - 1, 0)]] + [width] * (variant.blocks + 1),
                    level == 0,
                    Upsample(width) if level != last else None,
                    "res",
                )
                for level, width in enumerate(widths)
            )
        )
        self.norm_out = make_norm(widths[-1])
        self.conv_out = make_conv(widths[-1], 3)

    def forward(self, features: Tensor) -> Tensor:
        features = self.conv_blocks(self.mid(self.conv_in(features)))
        images: Tensor = self.conv_out(silu(self.norm_out(features)))
        return images


class Quantizer(nn.Module):
    """The codes as they are stored, of any length; they are compared and decoded at unit length."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.embedding = nn.Embedding(variant.codes, variant.code_channels)


class FQGAN(Tokenizer):
    """Nearest by angle, in each codebook on its own."""

    cosine: ClassVar[bool] = True

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.names = variant.codebooks
        self.encoder = Encoder(variant)
        self.decoder = Decoder(variant)
        for name in self.names:
            self.add_module(f"quantize_{name}", Quantizer(variant))
            self.add_module(f"quant_conv_{name}", nn.Conv2d(variant.latent, variant.code_channels, 1))
        self.post_quant_conv = nn.Conv2d(len(self.names) * variant.code_channels, variant.latent, 1)

    def encode(self, images: Tensor) -> Tensor:
        maps = zip(self.names, self.encoder(images), strict=True)
        return torch.stack([self.get_submodule(f"quant_conv_{name}")(features) for name, features in maps], 1)

    def codebooks(self) -> Tensor:
        return normalize(torch.stack([self.get_parameter(key) for key in self._tables()]), dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant_conv(codes.flatten(1, 2)))
        return images

    @torch.no_grad()
    def set_codebooks(self, codes: Tensor) -> None:
        for key, table in zip(self._tables(), codes, strict=True):
            self.get_parameter(key).copy_(table)

    def _tables(self) -> list[str]:
        return [f"quantize_{name}.embedding.weight" for name in self.names]
