"""Multi-scale deformable attention without grid sampling: bilinear reading by one gather of rows, as every engine runs it alike.

Zhu et al., "Deformable DETR", 2020. Engines differ in GridSample, some silently; see docs/decisions/0011-detections-are-rows.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # x, y


def attend(values: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Read `values` at `locations`, between the centres of pixels, and sum what was read by `weights`.

    Equals grid_sample with zero padding and align_corners=False on each level. Positions are exact in float32 only, so that the
    arguments have to be that.

    Args:
        values: [B,S,heads,D]; S runs over the levels, and over the rows and columns of each.
        sizes: (height, width) of each level, S in all.
        locations: [B,Q,heads,levels,points,2] as x, y; a level reaches from 0 to 1.
        weights: [B,Q,heads,levels,points].

    Returns:
        [B,Q,heads * D].
    """
    batch, positions, heads, channels = values.shape
    queries = locations.shape[1]
    device = values.device
    extent = torch.tensor([(width, height) for height, width in sizes], device=device).float()[:, None]  # [levels,1,2]
    counts = [height * width for height, width in sizes]
    starts = torch.tensor([sum(counts[:level]) for level in range(len(counts))], device=device)[:, None, None]
    points = (locations * extent - 0.5).unsqueeze(-2)
    corners = points.floor() + torch.tensor(_CORNERS, device=device)  # [B,Q,heads,levels,points,4,2]
    held = torch.minimum(corners.clamp(min=0), extent.unsqueeze(1) - 1)
    shares = (1 - (points - corners).abs()) * (corners == held)
    gains = shares[..., 0] * shares[..., 1] * weights.unsqueeze(-1)
    rows = (held[..., 1] * extent[..., :1] + held[..., 0]).long() + starts
    # Counted rather than by a range, whose length no one who reads the graph can tell.
    images = torch.ones_like(weights[:, :1, :1, :1, :1], dtype=torch.float32).cumsum(0).long().unsqueeze(-1) - 1
    index = (images * positions + rows) * heads + torch.arange(heads, device=device).view(-1, 1, 1, 1)
    read = embedding(index, values.reshape(-1, channels)).flatten(3, 5)
    return (gains.flatten(3).unsqueeze(3) @ read).reshape(batch, queries, heads * channels)
