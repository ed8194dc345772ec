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
        sin = _signed(sin)
        x = self.normalise(patches).to(self.embed.dtype) @ self.embed
        for index, block in enumerate(self.blocks):
            window = None if index in self.full else (windows, mask, places)
            x = x + self._attend(block.attn, _norm(block.norm1, x), cos, sin, window)
            x = x + block.mlp(_norm(block.norm2, x))
        merged = _norm(self.merger.ln_q, x).view(-1, self.merger.hidden_size)
        return cast("Tensor", self.merger.mlp(merged)).float()

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
        self.layers = nn.ModuleList(map(_Layer, language_model.layers))
        self.norm, self.head = language_model.norm, head
        rotary = language_model.rotary_emb
        # Which of the three positions each frequency turns with, one after the other in sections.
        axes = torch.tensor([axis % 3 for axis, size in enumerate(rotary.mrope_section) for _ in range(size)])
        self.turns = nn.Buffer(nn.functional.one_hot(axes, 3).float() * rotary.inv_freq.float()[:, None])
        self.gain = float(rotary.attention_scaling)
        self.groups = language_model.layers[0].self_attn.num_key_value_groups

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        x = inputs_embeds.to(self.head.weight.dtype)
        # One product is 0 for all axes but one, so that no sum is rounded.
        angles = (position_ids.float().transpose(1, 2)[:, :, None] * self.turns).sum(-1)
        cos, sin = (torch.cat((part, part), -1)[:, None].to(x.dtype) * self.gain for part in (angles.cos(), angles.sin()))
        rotary = cos, _signed(sin)
        new, known = inputs_embeds.shape[1], past[0].shape[2]
        mask = torch.arange(known + new)[None] <= torch.arange(new)[:, None] + known
        mask = mask.repeat(self.groups, 1)
        present: list[Tensor] = []
        for layer, *cache in zip(cast("Any", self.layers), past[::2], past[1::2], strict=True):
            attended, grown = layer.attend(_norm(layer.before, x), rotary, mask, cache)
            present += grown
            if layer is self.layers[-1]:  # of the others only keys and values are wanted from here on
                x, attended = x[:, -1:], attended[:, -1:]
            x = x + attended
            x = x + layer.mlp(_norm(layer.after, x))
        logits = self.head(_norm(self.norm, x[:, -1])).float()
        return (logits, *present)


class _Layer(nn.Module):
    """One layer of the decoder. Queries, keys and values are one product, and the queries of one head of keys attend together."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.before, self.after, self.mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        self.qkv, self.out = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj
        self.width: int = attention.head_dim
        self.queries = attention.q_proj.out_features // self.width
        self.keys = attention.k_proj.out_features // self.width

    def attend(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What attention adds to [B,S,H], and the keys and values of `cache` with those of `x`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        turned, new_values = torch.split(heads, [self.queries + self.keys, self.keys], 1)
        q, new_keys = torch.split(_rotate(turned, *rotary), [self.queries, self.keys], 1)
        keys, values = torch.cat((cache[0], new_keys), 2), torch.cat((cache[1], new_values), 2)
        grouped = q.reshape(q.shape[0], self.keys, -1, self.width)
        mixed = _attention(grouped, keys, values, mask).reshape(q.shape)
        return self.out(mixed.transpose(1, 2).flatten(2)), (keys, values)


def _side_by_side(*layers: nn.Linear) -> nn.Linear:
    """One layer that gives what `layers` give of the same input, one after the other."""
    biased, width = layers[0].bias is not None, sum(layer.out_features for layer in layers)
    joined = nn.Linear(layers[0].in_features, width, bias=biased, device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if biased:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


def _norm(norm: Any, x: Tensor) -> Tensor:
    """What the library's RMS norm gives. It multiplies with a reciprocal; this divides, for which onnxruntime has one kernel."""
    wide = x.float()
    scaled = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return cast("Tensor", norm.weight * scaled.to(x.dtype))


def _signed(sin: Tensor) -> Tensor:
    """For `_rotate`: the first half of the last axis negated."""
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`sin` as `_signed` gives it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin


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
