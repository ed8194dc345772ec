"""YOLOS' position tables for the engine's frame: computed once, where the network resizes them for every image."""

from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a


class Baked(nn.Module):
    """A table in place of transformers' `Interpolate...PositionEmbeddings`."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table)

    def forward(self, *arguments: Any) -> Tensor:
        return self.table


def _matches(module: Any) -> bool:
    return is_a(getattr(module, "library", module), "transformers.models.yolos.modeling_yolos.YolosForObjectDetection") and hasattr(
        module, "frame"
    )


def _replace(module: Any) -> nn.Module:
    """The whole detector, since only it knows the frame."""
    embeddings, encoder = module.library.vit.embeddings, module.library.vit.encoder
    with torch.no_grad():
        embeddings.interpolation = Baked(embeddings.interpolation(embeddings.position_embeddings, module.frame))
        if encoder.interpolation is not None:
            encoder.interpolation = Baked(encoder.interpolation(module.frame))
    replaced: nn.Module = module
    return replaced


BAKED_TABLES = Rewrite("yolos-baked-positions", _matches, _replace)
