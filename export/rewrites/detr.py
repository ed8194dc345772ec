"""DETR's padding masks as they are added to the scores; transformers makes them by indexing a table for every pair of positions."""

from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a

_MASKS = ("attention_mask", "encoder_attention_mask")


class MaskedPlainly(nn.Module):
    """An encoder or decoder whose masks [B,S], true where there is something to see, reach it as float32 [B,1,1,S]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **arguments: Any) -> Any:
        plain = {name: _added(mask) for name in _MASKS if (mask := arguments.get(name)) is not None}
        return self.inner(**arguments | plain)


def _added(mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]


def _matches(module: Any) -> bool:
    library = "transformers.models.detr.modeling_detr."
    return is_a(module, library + "DetrEncoder") or is_a(module, library + "DetrDecoder")


PLAIN_MASKS = Rewrite("detr-plain-masks", _matches, MaskedPlainly)
