"""Chat models in the second stage of an export: a Qwen2.5-VL becomes three engines, for seeing, for reading and for answering."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.manifest import TensorSpec
from export.spec import ChatReference, FreeAxes, Fused, Interface, LoadedChat


class Vision(nn.Module):
    """patches uint8 [N,C*T*P*P], cos and sin [N,head], windows int64 [W,K], lengths int64 [W], places int64 [N]
    -> image_features float32 [N/merge**2,H].

    The library sorts the patches by window, splits them where each window ends, and sorts the result back. Here they stay in their
    order; the layers with windows gather each window's patches, padded to the largest, and pick the answers up again. Attention
    gives the same whatever the order of its keys, so that this differs by rounding alone.
    """

    def __init__(self, tower: Any, preprocessing_mean: Tensor, preprocessing_std: Tensor, scale: float) -> None:
        """`preprocessing_mean` and `preprocessing_std`: float64 [C]."""
        super().__init__()
        config = tower.config
        self.blocks, self.merger = tower.blocks, tower.merger
        self.full = frozenset(config.fullatt_block_indexes)
        convolution = tower.patch_embed.proj
        self.embed = nn.Parameter(convolution.weight.flatten(1).t(), requires_grad=False)
        area = self.embed.shape[0] // len(preprocessing_mean)
        self.scale = scale
        self.mean = nn.Buffer(preprocessing_mean.float().repeat_interleave(area))
        self.std = nn.Buffer(preprocessing_std.float().repeat_interleave(area))

    def forward(  # noqa: PLR0917  the inputs of the graph, in its order
        self, patches: Tensor, cos: Tensor, sin: Tensor, windows: Tensor, lengths: Tensor, places: Tensor
    ) -> Tensor:
        mask = torch.arange(windows.shape[1])[None] < lengths[:, None]
        x = self.normalise(patches).to(self.embed.dtype) @ self.embed
        for index, block in enumerate(self.blocks):
            window = None if index in self.full else (windows, mask, places)
            x = x + self._attend(block.attn, block.norm1(x), cos, sin, window)
            x = x + block.mlp(block.norm2(x))
        return cast("Tensor", self.merger(x)).float()

    def normalise(self, patches: Tensor) -> Tensor:
        """The pixel values that the library's processor gives, float32 [N,C*T*P*P]."""
        return (patches.float() * self.scale - self.mean) / self.std

    def _attend(self, attention: Any, x: Tensor, cos: Tensor, sin: Tensor, window: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        heads, width = attention.num_heads, attention.head_dim
        q, k, v = attention.qkv(x).unflatten(-1, (3, heads, width)).unbind(1)
        q, k = (_rotate(part.float(), cos[:, None], sin[:, None]).to(x.dtype) for part in (q, k))
        if window is None:
            mixed = _attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None).transpose(0, 1)
        else:
            windows, mask, places = window
            q, k, v = (part[windows].transpose(1, 2) for part in (q, k, v))
            mixed = _attention(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(0, 1)[places]
        return cast("Tensor", attention.proj(mixed.flatten(1)))


class Embed(nn.Module):
    """input_ids int64 [B,S] -> inputs_embeds float32 [B,S,H]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        return cast("Tensor", self.embedding(input_ids)).float()


class Decoder(nn.Module):
    """inputs_embeds float32 [B,S,H], position_ids int64 [B,3,S] (time, down, across), each layer's keys and values
    [B,kv heads,P,head] -> logits float32 [B,vocabulary] of the last position, each layer's keys and values [B,kv heads,P+S,head].

    A token sees what is in the cache and, of its own call, itself and those before it.
    """

    def __init__(self, language_model: Any, head: nn.Linear) -> None:
        super().__init__()
        self.layers, self.norm, self.head = language_model.layers, language_model.norm, head
        rotary = language_model.rotary_emb
        # Which of the three positions each frequency turns with, one after the other in sections.
        axes = torch.tensor([axis % 3 for axis, size in enumerate(rotary.mrope_section) for _ in range(size)])
        self.turns = nn.Buffer(nn.functional.one_hot(axes, 3).float() * rotary.inv_freq.float()[:, None])
        self.gain = float(rotary.attention_scaling)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        x = inputs_embeds.to(self.head.weight.dtype)
        # One product is 0 for all axes but one, so that no sum is rounded.
        angles = (position_ids.float().transpose(1, 2)[:, :, None] * self.turns).sum(-1)
        cos, sin = (torch.cat((part, part), -1)[:, None].to(x.dtype) * self.gain for part in (angles.cos(), angles.sin()))
        new, known = inputs_embeds.shape[1], past[0].shape[2]
        mask = torch.arange(known + new)[None] <= torch.arange(new)[:, None] + known
        present: list[Tensor] = []
        for layer, *cache in zip(self.layers, past[::2], past[1::2], strict=True):
            attended, grown = self._attend(layer.self_attn, layer.input_layernorm(x), (cos, sin), mask, cache)
            present += grown
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = self.head(self.norm(x[:, -1])).float()
        return (logits, *present)

    def _attend(
        self, attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the layer's attention adds, and its keys and values with those of `x`."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = torch.cat((cache[0], _rotate(k, *rotary)), 2), torch.cat((cache[1], v), 2)
        grouped: Tensor = torch.unflatten(_rotate(q, *rotary), 1, (-1, attention.num_key_value_groups))
        mixed = _attention(grouped, keys[:, :, None], values[:, :, None], mask).flatten(1, 2)
        return attention.o_proj(mixed.transpose(1, 2).flatten(2)), (keys, values)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[...,queries,head], [...,keys,head] twice and a mask of the keys to look at -> [...,queries,head]; the softmax in float32."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    shares: Tensor = scores.softmax(-1).to(q.dtype)
    return shares @ v


def fuse_chat(loaded: LoadedChat) -> tuple[Fused, Fused, Fused]:
    """The graphs for the roles `vision`, `embed` and `decoder`; the loaded network stays as it is and is their reference.

    Their weights are the network's own, or for half precision copies of them.
    """
    network = loaded.network
    model = network.model
    tower, language_model, head = model.visual, model.language_model, network.lm_head
    if loaded.half:
        tower, language_model, head = (copy.deepcopy(part).half() for part in (tower, language_model, head))
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (loaded.preprocessing.mean, loaded.preprocessing.std))
    graphs = (
        Vision(tower, mean, std, loaded.preprocessing.scale),
        Embed(language_model.embed_tokens),
        Decoder(language_model, head),
    )
    interfaces = (_vision(network.config), _embed(network.config), _decoder(network.config, half=loaded.half))
    return cast(
        "tuple[Fused, Fused, Fused]",
        tuple(
            Fused(
                graph.eval(),
                interface,
                ChatReference(network, loaded.processor),
                sum(map(torch.numel, graph.parameters())),
                free=free,
                typed=True,
            )
            for graph, (interface, free) in zip(graphs, interfaces, strict=True)
        ),
    )


def _vision(config: Any) -> tuple[Interface, FreeAxes]:
    vision = config.vision_config
    length = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    width = vision.hidden_size // vision.num_heads
    return Interface(
        "vision",
        (
            TensorSpec(name="patches", dtype="uint8", shape=(-1, length)),
            TensorSpec(name="cos", dtype="float32", shape=(-1, width)),
            TensorSpec(name="sin", dtype="float32", shape=(-1, width)),
            TensorSpec(name="windows", dtype="int64", shape=(-1, -1)),
            TensorSpec(name="lengths", dtype="int64", shape=(-1,)),
            TensorSpec(name="places", dtype="int64", shape=(-1,)),
        ),
        (TensorSpec(name="image_features", dtype="float32", shape=(-1, vision.out_hidden_size)),),
    ), (
        ("patches", None),
        ("patches", None),
        ("patches", None),
        ("windows", "window"),
        ("windows",),
        ("patches",),
    )


def _embed(config: Any) -> tuple[Interface, FreeAxes]:
    return Interface(
        "embed",
        (TensorSpec(name="input_ids", dtype="int64", shape=(-1, -1)),),
        (TensorSpec(name="inputs_embeds", dtype="float32", shape=(-1, -1, config.text_config.hidden_size)),),
    ), (("batch", "sequence"),)


def _decoder(config: Any, *, half: bool) -> tuple[Interface, FreeAxes]:
    text = config.text_config
    width = text.hidden_size // text.num_attention_heads
    names = [f"{layer}.{part}" for layer in range(text.num_hidden_layers) for part in ("key", "value")]
    kind = "float16" if half else "float32"

    def cache(when: str) -> tuple[TensorSpec, ...]:
        shape = (-1, text.num_key_value_heads, -1, width)
        return tuple(TensorSpec.model_validate({"name": f"{when}.{name}", "dtype": kind, "shape": shape}) for name in names)

    return Interface(
        "decoder",
        (
            TensorSpec(name="inputs_embeds", dtype="float32", shape=(-1, -1, text.hidden_size)),
            TensorSpec(name="position_ids", dtype="int64", shape=(-1, 3, -1)),
            *cache("past"),
        ),
        (TensorSpec(name="logits", dtype="float32", shape=(-1, text.vocab_size)), *cache("present")),
    ), (
        ("batch", "sequence", None),
        ("batch", None, "sequence"),
        *((("batch", None, "past", None),) * len(names)),
    )
