"""VOLO's unfold and fold as one-hot convolutions: ONNX has Col2Im for fold, which TensorRT has not."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.rewrites.base import Rewrite, is_a


class OneHotOutlook(nn.Module):
    """timm's `OutlookAttention`; each channel's k x k neighbourhood is picked out, and put back, by a grouped convolution."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.v: nn.Linear = layer.v
        self.attn: nn.Linear = layer.attn
        self.proj: nn.Linear = layer.proj
        self.pool: nn.Module = layer.pool
        self.num_heads: int = layer.num_heads
        self.scale: float = layer.scale
        self.kernel_size: int = layer.kernel_size
        self.stride: int = layer.stride
        self.padding: int = layer.padding
        channels = self.proj.in_features
        area = self.kernel_size**2
        one_hot = torch.eye(area).view(area, 1, self.kernel_size, self.kernel_size)
        self.one_hot = nn.Buffer(one_hot.repeat(channels, 1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[B,H,W,C] -> [B,H,W,C]."""
        batch, height, width, channels = features.shape
        rows, columns = math.ceil(height / self.stride), math.ceil(width / self.stride)
        area, places, depth = self.kernel_size**2, rows * columns, channels // self.num_heads

        values = F.conv2d(self.v(features).permute(0, 3, 1, 2), self.one_hot, None, self.stride, self.padding, groups=channels)
        values = values.reshape(batch, self.num_heads, depth, area, places).permute(0, 1, 4, 3, 2)
        scores = self.attn(self.pool(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        scores = scores.reshape(batch, places, self.num_heads, area, area).permute(0, 2, 1, 3, 4)
        mixed = (scores * self.scale).softmax(-1) @ values
        mixed = mixed.permute(0, 1, 4, 3, 2).reshape(batch, channels * area, rows, columns)

        missing = (self._missing(height, rows), self._missing(width, columns))
        folded = F.conv_transpose2d(mixed, self.one_hot, None, self.stride, self.padding, missing, groups=channels)
        projected: Tensor = self.proj(folded.permute(0, 2, 3, 1))
        return projected

    def _missing(self, size: int, places: int) -> int:
        """Pixels at the far edge that no neighbourhood reaches."""
        return size - ((places - 1) * self.stride - 2 * self.padding + self.kernel_size)


ONE_HOT_OUTLOOK = Rewrite("volo-one-hot-fold", lambda module: is_a(module, "timm.models.volo.OutlookAttention"), OneHotOutlook)
