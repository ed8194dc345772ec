"""TransVG++: a plain Vision Transformer that finds what a phrase describes; four of its blocks look at BERT's words.

Deng et al., "TransVG++: End-to-End Visual Grounding with Language Conditioned Vision Transformer", 2022. Images are fitted into
640 x 640 and padded on all sides with the mean; a [reg] token beside the 1,600 patches becomes the box. The paper's sizes:

| variant | width, heads | parameters, visual + heads | BERT | multiply-adds, visual + heads | BERT, 20 tokens |
| --- | --- | --- | --- | --- | --- |
| tiny | 192, 3 | 6.65 M | 109.5 M | 21.1 G | 1.7 G |
| small | 384, 6 | 25.0 M | 109.5 M | 60.2 G | 1.7 G |
| base | 768, 12 | 97.2 M | 109.5 M | 192.3 G | 1.7 G |

RefCOCO's phrases have at most 20 tokens, RefCOCOg's 40 (`length=40`). The paper's network has no confidence, so the engine gives a
box alone.

A small one, 1.97 million parameters with all of its BERT at 256 x 256, to be trained from nothing on phrases of few words:

    make(width=128, heads=4, depth=6, modulated=(1, 3, 5), image_size=256, text=(2, 128, 4, 256), vocabulary=400, positions=40)

`network(images, input_ids, attention_mask)` gives boxes cxcywh in 0..1 with gradients, for an L1 and a GIoU loss. Dropout is 0
unless `dropout` says otherwise, and is BERT's alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from export.grounder import Grounder

TASK = "ground"
PAPER = "arXiv:2206.06619"
PREPROCESSING = {
    "input_size": (3, 640, 640),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_mode": "letterbox",
    "anchor": "centre",
}
TRAINING_ONLY = ("*.embeddings.position_ids",)  # a table of 0, 1, 2 ... that older files have


@dataclass(frozen=True)
class TextSize:
    """Of BERT."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072


@dataclass(frozen=True)
class Variant:
    """`modulated`: the blocks that look at the words, counted from 0. `length`: tokens of a phrase."""

    width: int
    heads: int
    depth: int = 12
    modulated: tuple[int, ...] = (2, 5, 8, 11)
    image_size: int = 640
    patch: int = 16
    head: int = 256
    text: TextSize = TextSize()
    vocabulary: int = 30522
    positions: int = 512
    length: int = 20
    dropout: float = 0.0


VARIANTS = {"tiny": Variant(192, 3), "small": Variant(384, 6), "base": Variant(768, 12)}
EPSILON = 1e-6


def make(variant: str = "tiny", *, text: tuple[int, int, int, int] | None = None, **changes: Any) -> "TransVGPlusPlus":
    """One of VARIANTS, with any of its fields changed; `text` is BERT's (depth, width, heads, hidden)."""
    if text is not None:
        changes["text"] = TextSize(*text)
    return TransVGPlusPlus(replace(VARIANTS[variant], **changes))


class Attention(nn.Module):
    """Of `queries` [B,N,D] over `keys` [B,M,D]; `bias` [B,1,1,M] is added to the logits; what has the least number is not seen."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q_in, self.k_in, self.v_in, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
        asked, offered, values = (self._split(part) for part in (self.q_in(queries), self.k_in(keys), self.v_in(keys)))
        logits = (asked * self.scale) @ offered.transpose(2, 3)
        weights = torch.softmax(logits if bias is None else logits + bias, -1)
        seen: Tensor = self.proj((weights @ values).transpose(1, 2).flatten(2))
        return seen

    def _split(self, tokens: Tensor) -> Tensor:
        """[B,N,D] -> [B,heads,N,D/heads]."""
        batch, count, width = tokens.shape
        return tokens.view(batch, count, self.heads, width // self.heads).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        widened: Tensor = self.fc2(nn.functional.gelu(self.fc1(tokens)))
        return widened


class Block(nn.Module):
    """A pre-norm transformer block. A modulated one also looks at the words, between attention and MLP and without a norm."""

    def __init__(self, width: int, heads: int, modulated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        if modulated:
            self.lang_modulation = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = MLP(width)
        self.modulated = modulated

    def forward(self, tokens: Tensor, words: Tensor, unseen: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, normed)
        if self.modulated:
            tokens = tokens + self.lang_modulation(tokens, words, unseen)
        updated: Tensor = tokens + self.mlp(self.norm2(tokens))
        return updated


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,D,h,w]."""
        patches: Tensor = self.proj(images)
        return patches


class VisualBranch(nn.Module):
    """[reg] token and patches [B,1+h*w,D] through all blocks."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        side, width = variant.image_size // variant.patch, variant.width
        self.patch_embed = PatchEmbed(width, variant.patch)
        self.pos_embed = nn.Parameter(torch.randn(1, width, side, side) * 0.02)
        modulated = [index in variant.modulated for index in range(variant.depth)]
        self.blocks = nn.ModuleList(Block(width, variant.heads, wanted) for wanted in modulated)
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, images: Tensor, reg_token: Tensor, words: Tensor, unseen: Tensor) -> Tensor:
        """The [reg] token at last, [B,D]."""
        patches = (self.patch_embed(images) + self.pos_embed).flatten(2).transpose(1, 2)
        tokens = torch.cat([reg_token.expand(patches.shape[0], -1, -1), patches], 1)
        for block in self.blocks:
            tokens = block(tokens, words, unseen)
        found: Tensor = self.norm(tokens[:, 0])
        return found


class LanguageBranch(nn.Module):
    """BERT: ids [B,L] and what is not seen of them [B,1,1,L] -> its last states [B,L,D].

    Of a mask with an axis for heads and queries BERT makes nothing more: of [B,L] it would gather the other axes by index.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=variant.vocabulary,
            hidden_size=variant.text.width,
            num_hidden_layers=variant.text.depth,
            num_attention_heads=variant.text.heads,
            intermediate_size=variant.text.hidden,
            max_position_embeddings=variant.positions,
            hidden_dropout_prob=variant.dropout,
            attention_probs_dropout_prob=variant.dropout,
            attn_implementation="eager",
        )
        self.language_backbone = BertModel(config)

    def forward(self, input_ids: Tensor, unseen: Tensor) -> Tensor:
        states: Tensor = self.language_backbone(input_ids=input_ids, attention_mask=unseen).last_hidden_state
        return states


class PredictionHead(nn.Module):
    """[B,D] -> the box's logits [B,4]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 4)])

    def forward(self, found: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            found = torch.relu(layer(found))
        logits: Tensor = self.layers[-1](found)
        return logits


class TransVGPlusPlus(Grounder):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.length = variant.length
        self.vocabulary = variant.vocabulary
        self.language_branch = LanguageBranch(variant)
        self.text_proj = nn.Linear(variant.text.width, variant.width)
        self.reg_token = nn.Parameter(torch.randn(1, 1, variant.width) * 0.02)
        self.visual_branch = VisualBranch(variant)
        self.prediction_head = PredictionHead(variant.width, variant.head)

    def locate(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        unseen = torch.where(attention_mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        words = self.text_proj(self.language_branch(input_ids, unseen))
        logits: Tensor = self.prediction_head(self.visual_branch(images, self.reg_token, words, unseen))
        return logits
