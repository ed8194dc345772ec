"""ViDT+: a detector made of transformers alone, whose tokens for objects and their masks go through a Swin beside its patches.

Song et al., "An Extendable, Efficient and Effective Transformer-based Object Detector", 2022. COCO, 300 detection tokens, the
shorter side at 800 pixels; the best 100 pairs of token and class are answered:

| variant | backbone | parameters | published | box AP | mask AP |
| --- | --- | --- | --- | --- | --- |
| nano | Swin 48, depths 2, 2, 6, 2 | 16.5 M | 16 M | 45.3 | |
| tiny | Swin 96, depths 2, 2, 6, 2 | 38.3 M | 38 M | 49.7 | 39.5 |
| small | Swin 96, depths 2, 2, 18, 2 | 60.8 M | 61 M | 51.2 | 40.8 |
| base | Swin 128, depths 2, 2, 18, 2 | 100.0 M | 100 M | 53.2 | |

The authors give no multiply-adds. Precision is theirs. Masks are 256 coefficients of the cosine transform of 128 x 128 pixels. The
heads that guess a box's IoU are not counted: they serve training alone (`ious=True`), the answer's score is the class's sigmoid.

An image is fitted into the frame and padded at the right and the bottom; padding is masked as in the authors' batches. Theirs had
frames of any shape, an engine has one: `--input-size` sets it. `--model-arg masks=False` is for checkpoints without masks.

Small ones are made of the fields of `Variant`. This one, of 1.95 M parameters, is meant for frames of 256 pixels:

    make("nano", classes=8, width=24, depths=(2, 2, 2, 2), window=8, queries=40, channels=80, decoder_heads=4, layers=3,
         hidden=256, bottleneck=32, groups=8, masks=False, rows=40)

`network(images)` gives what training compares with the truth: the answers of every level (see `Levels`).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from app.manifest import MaskCoefficients
from export.architectures._swin_ram import Padding, SwinWithTokens
from export.deformable import attend
from export.detector import Detector, Queries

TASK = "detect"
PAPER = "arXiv:2204.07962"
LICENCE = "Apache-2.0"
PREPROCESSING = {
    "input_size": (3, 1024, 1024),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_mode": "letterbox",
    "interpolation": "bilinear",
}
TRAINING_ONLY = (
    "transformer.enc_output*",
    "transformer.token_embed.*",
    "iou_embed.*",
    # Not only for training: what the authors' network holds without using it.
    "transformer.decoder.bbox_embed.*",
    "transformer.level_embed",
    "backbone.norm?.*",
    "backbone.layers.*.downsample.expansion.*",
    "backbone.layers.*.downsample.norm2.*",
    "fusion.multi_scaler.refinenet_3.smoothing.*",
    "fusion.multi_scaler.refinenet_3.resConfUnit1.*",
)


@dataclass(frozen=True)
class Variant:
    """`width`, `depths`, `heads`, `window`, `patch` and `drop_path` are the backbone's; `queries` its detection tokens.

    `channels`: of everything behind the backbone; `layers`, `decoder_heads`, `points` and `hidden` are the decoder's, `bottleneck`
    the fusion's; `groups` is how many each normalisation by groups has. `coefficients` and `mask_side`: of a mask. `rows` are
    answered.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    patch: int = 4
    drop_path: float = 0.0
    queries: int = 300
    channels: int = 256
    layers: int = 6
    decoder_heads: int = 8
    points: int = 4
    hidden: int = 1024
    dropout: float = 0.1
    bottleneck: int = 64
    groups: int = 32
    classes: int = 91
    ious: bool = False
    masks: bool = True
    coefficients: int = 256
    mask_side: int = 128
    rows: int = 100


VARIANTS = {
    "nano": Variant(width=48),
    "tiny": Variant(drop_path=0.2),
    "small": Variant(depths=(2, 2, 18, 2), drop_path=0.3),
    "base": Variant(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.3),
}


def make(variant: str = "nano", **changes: Any) -> "ViDTPlus":
    """One of VARIANTS, with any of its fields changed."""
    return ViDTPlus(replace(VARIANTS[variant], **changes))


class Levels(NamedTuple):
    """What every level says, first of the backbone's tokens alone, then after each decoder layer; the last is the answer.

    `logits` [levels,B,Q,classes] of sigmoids; `boxes` [levels,B,Q,4], centre x, centre y, width, height in shares of the content;
    `ious` [levels,B,Q], logits of the box's IoU, and `masks` [levels,B,Q,coefficients], where the variant has them.
    """

    logits: Tensor
    boxes: Tensor
    ious: Tensor | None
    masks: Tensor | None


class Memory(NamedTuple):
    """What the decoder reads: `tokens` [B,S,C], the maps of `sizes` (height, width) in one, from coarse to fine.

    Of padded images also `held` [B,S,1], 0 where a map shows padding, and `shown` [B,1,levels,4], the shares of each map's width
    and height, twice, that show the image.
    """

    tokens: Tensor
    sizes: list[tuple[int, int]]
    held: Tensor | None
    shown: Tensor | None


class MLP(nn.Module):
    """Three linear layers."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList((nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, outputs)))

    def forward(self, tokens: Tensor) -> Tensor:
        first, second, third = self.layers
        mapped: Tensor = third(relu(second(relu(first(tokens)))))
        return mapped


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3 = nn.Conv2d(inner, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = features + self.conv3(relu(self.conv2(relu(self.conv1(relu(features))))))
        return changed


class Refinement(nn.Module):
    """Joins a map to the coarser one before it, where there is one."""

    def __init__(self, width: int, inner: int, *, coarsest: bool) -> None:
        super().__init__()
        if not coarsest:
            self.smoothing = nn.Conv2d(width, width, 1)
            self.resConfUnit1 = Bottleneck(width, inner)
        self.resConfUnit2 = Bottleneck(width, inner)

    def forward(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        if coarser is not None:
            size = (features.shape[2], features.shape[3])
            larger = interpolate(coarser, size, mode="bilinear", align_corners=True)
            features = self.smoothing(larger) + self.resConfUnit1(features)
        refined: Tensor = self.resConfUnit2(features)
        return refined


class Fusion(nn.Module):
    """Maps from fine to coarse -> maps [B,channels,h,w] from coarse to fine."""

    def __init__(self, inputs: tuple[int, ...], variant: Variant) -> None:
        super().__init__()
        self.levels = len(inputs)
        self.multi_scaler = nn.ModuleDict()
        for level, width in enumerate(inputs):
            coarsest = level == len(inputs) - 1
            self.multi_scaler[f"layer_{level}_rn"] = nn.Conv2d(width, variant.channels, 1)
            self.multi_scaler[f"p_norm_{level}"] = nn.GroupNorm(variant.groups, variant.channels)
            self.multi_scaler[f"refinenet_{level}"] = Refinement(variant.channels, variant.bottleneck, coarsest=coarsest)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        fused: list[Tensor] = []
        for level in reversed(range(self.levels)):
            scaler = self.multi_scaler
            features = scaler[f"p_norm_{level}"](scaler[f"layer_{level}_rn"](maps[level]))
            fused.append(scaler[f"refinenet_{level}"](features, fused[-1] if fused else None))
        return fused


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, with its parameters' names, of queries and keys alike."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        sources = (tokens + positions, tokens + positions, tokens)
        queries, keys, values = (
            nn.functional.linear(source, weight, bias).view(batch, count, self.heads, width // self.heads).transpose(1, 2)
            for source, weight, bias in zip(sources, weights, biases, strict=True)
        )
        attention = self.dropout((queries * (width // self.heads) ** -0.5 @ keys.transpose(-2, -1)).softmax(-1))
        mixed: Tensor = self.out_proj((attention @ values).transpose(1, 2).flatten(2))
        return mixed


class DeformableAttention(nn.Module):
    """Queries [B,Q,C] read a few points around their boxes [B,Q,4] in every map."""

    def __init__(self, width: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.shape = (heads, levels, points)
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._initialise()

    def forward(self, queries: Tensor, boxes: Tensor, memory: Memory) -> Tensor:
        batch, count, width = queries.shape
        heads, levels, points = self.shape
        values = self.value_proj(memory.tokens)
        values = (values if memory.held is None else values * memory.held).view(batch, -1, heads, width // heads)
        offsets = self.sampling_offsets(queries).view(batch, count, *self.shape, 2)
        weights = self.attention_weights(queries).view(batch, count, heads, levels * points).softmax(-1)
        around = boxes.unsqueeze(2).expand(-1, -1, levels, -1)
        around = (around if memory.shown is None else around * memory.shown)[:, :, None, :, None]
        locations = around[..., :2] + offsets / points * around[..., 2:] * 0.5
        read: Tensor = self.output_proj(attend(values, memory.sizes, locations, weights.view(batch, count, *self.shape)))
        return read

    def _initialise(self) -> None:
        """Points in a direction of each head's own, at growing distances."""
        heads, levels, points = self.shape
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, points + 1).view(1, 1, points, 1)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_((directions[:, None, None] * distances).expand(heads, levels, points, 2).flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)


class DecoderLayer(nn.Module):
    def __init__(self, variant: Variant, levels: int) -> None:
        super().__init__()
        width = variant.channels
        self.cross_attn = DeformableAttention(width, levels, variant.decoder_heads, variant.points)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, variant.decoder_heads, variant.dropout)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, variant.hidden)
        self.linear2 = nn.Linear(variant.hidden, width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(variant.dropout)

    def forward(self, tokens: Tensor, positions: Tensor, boxes: Tensor, memory: Memory) -> Tensor:
        tokens = self.norm2(tokens + self.dropout(self.self_attn(tokens, positions)))
        tokens = self.norm1(tokens + self.dropout(self.cross_attn(tokens + positions, boxes, memory)))
        mapped = self.linear2(self.dropout(relu(self.linear1(tokens))))
        decoded: Tensor = self.norm3(tokens + self.dropout(mapped))
        return decoded


class Decoder(nn.Module):
    def __init__(self, variant: Variant, levels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(variant, levels) for _ in range(variant.layers))


class Transformer(nn.Module):
    """The decoder's layers, and where each query looks first."""

    def __init__(self, variant: Variant, levels: int) -> None:
        super().__init__()
        self.reference_points = nn.Linear(variant.channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        self.decoder = Decoder(variant, levels)


class ViDTPlus(Detector):
    """One head of each kind for every level; that of masks is one for all."""

    score = "sigmoid"
    content = True

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        width, predictions = variant.channels, variant.layers + 1
        self.rows = variant.rows
        self.backbone = SwinWithTokens(
            variant.width,
            variant.depths,
            variant.heads,
            window=variant.window,
            patch=variant.patch,
            tokens=variant.queries,
            positions=width,
            drop_path=variant.drop_path,
        )
        maps = self.backbone.channels
        self.fusion = Fusion(maps, variant)
        self.tgt_proj = nn.Sequential(nn.Conv2d(maps[-2], width, 1), nn.GroupNorm(variant.groups, width))
        self.query_pos_proj = nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(variant.groups, width))
        self.transformer = Transformer(variant, len(maps))
        self.class_embed = nn.ModuleList(nn.Linear(width, variant.classes) for _ in range(predictions))
        self.bbox_embed = nn.ModuleList(MLP(width, 4) for _ in range(predictions))
        self.iou_embed = nn.ModuleList(MLP(width, 1) for _ in range(predictions)) if variant.ious else None
        self.vector_embed: nn.ModuleList | None = None
        if variant.masks:
            self.vector_embed = nn.ModuleList([MLP(width, variant.coefficients)] * predictions)
            self.mask_coefficients = MaskCoefficients(count=variant.coefficients, side=variant.mask_side)
        self._initialise()

    def encode(self, images: Tensor, content: Tensor | None) -> Tensor:
        """[B,S+Q,channels]: the fused maps from coarse to fine, and the backbone's tokens."""
        padding = Padding((images.shape[2], images.shape[3]), content)
        whole = padding.inside(padding.frame)
        if whole is not None:
            images = images * (whole[0][:, None, :, None] * whole[1][:, None, None, :])
        maps, tokens = self.backbone(images, padding)
        memory = [level.flatten(2).transpose(1, 2) for level in self.fusion(maps)]
        return torch.cat([*memory, _project(self.tgt_proj, tokens)], 1)

    def decode(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> Queries:
        states, boxes = self._refine(features, frame, content)
        centre, size = boxes[-1].chunk(2, -1)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1)
        if content is not None:
            shown = content / torch.tensor(frame, device=content.device)
            corners = corners * shown.flip(1).repeat(1, 2).unsqueeze(1)
        masks = None if self.vector_embed is None else self.vector_embed[-1](states[-1])
        return Queries(self.class_embed[-1](states[-1]), corners, masks)

    def forward(self, images: Tensor, content: Tensor | None = None) -> Levels:
        """Normalised float32 [B,3,H,W]; `content` int32 [B,2] where they are padded. What training needs."""
        frame = (images.shape[2], images.shape[3])
        states, boxes = self._refine(self.encode(images, content), frame, content)
        logits = _each(self.class_embed, states)
        ious = None if self.iou_embed is None else _each(self.iou_embed, states).squeeze(-1)
        masks = None if self.vector_embed is None else _each(self.vector_embed, states)
        return Levels(logits, torch.stack(boxes), ious, masks)

    def _refine(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Each level's tokens [B,Q,C] and boxes [B,Q,4]; a level looks around the box of the one before, without gradient."""
        sizes = self.backbone.sizes(frame)[::-1]
        queries = self.backbone.det_pos_embed.shape[1]
        tokens = features[:, -queries:]
        memory = Memory(features[:, :-queries], sizes, *_held(Padding(frame, content), sizes))
        positions = _project(self.query_pos_proj, self.backbone.det_pos_embed)
        first = inverse_sigmoid(self.transformer.reference_points(positions).sigmoid())
        offset = self.bbox_embed[0](tokens)
        boxes = [torch.cat([offset[..., :2] + first, offset[..., 2:]], -1).sigmoid()]
        states = [tokens]
        for layer, head in zip(self.transformer.decoder.layers, self.bbox_embed[1:], strict=True):
            box = boxes[-1].detach()
            tokens = layer(tokens, positions, box, memory)
            states.append(tokens)
            boxes.append((head(tokens) + inverse_sigmoid(box)).sigmoid())
        return states, boxes

    def _initialise(self) -> None:
        """As the authors: every class rare, every box small and where its query looks first."""
        for projection in (self.tgt_proj[0], self.query_pos_proj[0]):
            assert isinstance(projection, nn.Conv2d)
            nn.init.xavier_uniform_(projection.weight)
            _clear_bias(projection)
        for head in self.class_embed:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, -math.log(99))
        for head in (*self.bbox_embed, *(self.vector_embed or ())):
            last = _last(head)
            nn.init.zeros_(last.weight)
            _clear_bias(last)
        nn.init.constant_(_last(self.bbox_embed[0]).bias[2:], -2.0)


def _last(head: nn.Module) -> nn.Linear:
    assert isinstance(head, MLP)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    return last


def _clear_bias(layer: nn.Linear | nn.Conv2d) -> None:
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _each(heads: nn.ModuleList, states: list[Tensor]) -> Tensor:
    """[levels,B,Q,...] of each level's own head."""
    return torch.stack([head(state) for head, state in zip(heads, states, strict=True)])


def inverse_sigmoid(shares: Tensor) -> Tensor:
    """Logits of shares, those below 1e-5 and above 1 - 1e-5 taken for that."""
    return torch.log(shares.clamp(min=1e-5) / (1 - shares).clamp(min=1e-5))


def _project(projection: nn.Module, tokens: Tensor) -> Tensor:
    """[B,Q,C] through a convolution and its normalisation, both made for maps."""
    projected: Tensor = projection(tokens.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    return projected


def _held(padding: Padding, sizes: list[tuple[int, int]]) -> tuple[Tensor | None, Tensor | None]:
    """`held` and `shown` of a memory."""
    maps = [inside for size in sizes if (inside := padding.inside(size)) is not None]
    if not maps:
        return None, None
    held = torch.cat([(rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1) for rows, columns in maps], 1)
    shown = torch.stack([torch.stack([columns.mean(1), rows.mean(1)], -1) for rows, columns in maps], 1)
    return held.unsqueeze(-1), shown.repeat(1, 1, 2).unsqueeze(1)
