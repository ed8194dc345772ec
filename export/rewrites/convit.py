"""ConViT's positional attention as a constant: it depends on the weights and the image size, never on the image."""

from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a


class GatedAttention(nn.Module):
    """timm's `GPSA` with sigmoid(gate) * softmax(position scores) computed once, [1,heads,N,N]."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.qk: nn.Linear = layer.qk
        self.v: nn.Linear = layer.v
        self.proj: nn.Linear = layer.proj
        self.num_heads: int = layer.num_heads
        self.scale: float = layer.scale
        with torch.no_grad():
            gate = layer.gating_param.sigmoid().view(1, -1, 1, 1)
            scores = layer.pos_proj(layer.rel_indices).permute(0, 3, 1, 2)
            self.positions = nn.Buffer(gate * scores.softmax(-1))
            self.content_gain = nn.Buffer(1 - gate)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]."""
        batch, count, width = tokens.shape
        heads = (self.num_heads, width // self.num_heads)
        queries, keys = self.qk(tokens).reshape(batch, count, 2, *heads).permute(2, 0, 3, 1, 4).unbind(0)
        content = ((queries @ keys.transpose(-2, -1)) * self.scale).softmax(-1)
        attention = self.content_gain * content + self.positions
        attention = attention / attention.sum(-1, keepdim=True)
        values = self.v(tokens).reshape(batch, count, *heads).permute(0, 2, 1, 3)
        mixed: Tensor = self.proj((attention @ values).transpose(1, 2).reshape(batch, count, width))
        return mixed


def _matches(module: Any) -> bool:
    return is_a(module, "timm.models.convit.GPSA") and bool(module.rel_indices.shape[1] > 1)


BAKED_POSITIONS = Rewrite("convit-baked-positions", _matches, GatedAttention)
