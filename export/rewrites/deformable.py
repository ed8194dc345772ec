"""The deformable attention of transformers by gathers, where it samples a grid, which engines do not do alike."""

from typing import Any

from torch import Tensor, nn

from export.deformable import attend
from export.rewrites.base import Rewrite


class GatheredAttention(nn.Module):
    """transformers' `MultiScaleDeformableAttention`, which has no parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()

    def forward(  # noqa: PLR0917 -- as it is called
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """[B,S,heads,D] -> [B,Q,heads * D]; see `attend`."""
        return attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _matches(module: Any) -> bool:
    return type(module).__name__ == "MultiScaleDeformableAttention" and type(module).__module__.startswith("transformers.")


GATHERED_ATTENTION = Rewrite("gathered-deformable-attention", _matches, GatheredAttention)
