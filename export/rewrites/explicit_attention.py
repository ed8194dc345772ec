"""timm's attention layers by their own explicit path: the exporter adds shape arithmetic to the fused one, or refuses it in 5-D."""

from typing import Any

from torch import nn

from export.rewrites.base import Rewrite


def _matches(module: Any) -> bool:
    return type(module).__module__.startswith("timm.") and getattr(module, "fused_attn", False) is True


def _replace(module: Any) -> nn.Module:
    module.fused_attn = False  # every such layer branches on it
    replaced: nn.Module = module
    return replaced


EXPLICIT_ATTENTION = Rewrite("explicit-attention", _matches, _replace)
