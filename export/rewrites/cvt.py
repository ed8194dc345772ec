"""The attention of transformers' CvT with MatMul in place of Einsum, which engines run more slowly and TensorRT with limits."""

from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a


class MatMulAttention(nn.Module):
    """transformers' `CvtSelfAttention` in eval mode."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            (layer.convolution_projection_query, layer.convolution_projection_key, layer.convolution_projection_value)
        )
        self.linears = nn.ModuleList((layer.projection_query, layer.projection_key, layer.projection_value))
        self.with_cls_token: bool = layer.with_cls_token
        self.num_heads: int = layer.num_heads
        self.scale: float = layer.scale

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """[B,(1+)H*W,C] -> [B,(1+)H*W,C]."""
        classes, patches = (tokens[:, :1], tokens[:, 1:]) if self.with_cls_token else (None, tokens)
        batch, _, channels = tokens.shape
        feature_map = patches.transpose(1, 2).reshape(batch, channels, height, width)

        def heads(convolution: nn.Module, linear: nn.Module) -> Tensor:
            projected = convolution(feature_map)
            if classes is not None:
                projected = torch.cat((classes, projected), dim=1)
            split: Tensor = linear(projected).reshape(batch, -1, self.num_heads, channels // self.num_heads)
            return split.transpose(1, 2)

        queries, keys, values = map(heads, self.convolutions, self.linears)
        attention = (queries @ keys.transpose(-2, -1) * self.scale).softmax(-1)
        return (attention @ values).transpose(1, 2).reshape(batch, -1, channels)


MATMUL_ATTENTION = Rewrite(
    "cvt-matmul-attention", lambda module: is_a(module, "transformers.models.cvt.modeling_cvt.CvtSelfAttention"), MatMulAttention
)
