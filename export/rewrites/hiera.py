"""Hiera's unroll as one Gather: it is a fixed permutation of the tokens, written as reshapes that fold into the batch."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a


class GatheredUnroll(nn.Module):
    """[B,N,C] -> [B,N,C] with the tokens in the order of the mask units."""

    def __init__(self, unroll: Any) -> None:
        super().__init__()
        count = math.prod(unroll.size)
        order = unroll(torch.arange(count, dtype=torch.float32).view(1, count, 1))
        self.order = nn.Buffer(order.flatten().long())

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.index_select(1, self.order)


GATHERED_UNROLL = Rewrite("hiera-gathered-unroll", lambda module: is_a(module, "timm.models.hiera.Unroll"), GatheredUnroll)
