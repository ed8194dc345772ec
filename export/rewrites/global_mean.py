"""Adaptive average pooling to one pixel as a mean: behind a transpose, the exporter makes a strided gather of it."""

from typing import Any

from torch import Tensor, nn

from export.rewrites.base import Rewrite


class GlobalMean(nn.Module):
    """[B,C,H,W] -> [B,C,1,1]."""

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(2).mean(-1)[..., None, None]


def _matches(module: Any) -> bool:
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


GLOBAL_MEAN = Rewrite("global-mean", _matches, lambda module: GlobalMean())
