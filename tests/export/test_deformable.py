"""Deformable attention by gathers against the same by grid_sample, whose meaning it has to have."""

import pytest
import torch
from torch import Tensor, nn

from export.deformable import attend

SIZES = [(3, 5), (8, 6), (1, 1)]


def by_grid_sample(values: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable DETR's own reference."""
    batch, _, heads, channels = values.shape
    _, queries, _, _, points, _ = locations.shape
    read = []
    for level, of_level in enumerate(values.split([height * width for height, width in sizes], 1)):
        maps = of_level.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *sizes[level])
        grid = (2 * locations - 1)[:, :, :, level].transpose(1, 2).flatten(0, 1)
        read.append(nn.functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    by_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(sizes) * points)
    summed = (torch.stack(read, -2).flatten(-2) * by_head).sum(-1)
    return summed.view(batch, heads * channels, queries).transpose(1, 2)


def draw(seed: int, spread: float) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Two images, 7 queries, 2 heads of 4 channels, 3 points; locations reach `spread` beyond the maps."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(2, sum(height * width for height, width in SIZES), 2, 4, generator=random)
    locations = torch.rand(2, 7, 2, len(SIZES), 3, 2, generator=random) * (1 + 2 * spread) - spread
    weights = torch.rand(2, 7, 2, len(SIZES), 3, generator=random)
    return values, SIZES, locations, weights


@pytest.mark.parametrize("spread", [0.0, 0.5], ids=["within", "beyond"])
@pytest.mark.parametrize("seed", range(5))
def test_it_reads_what_grid_sample_reads(seed: int, spread: float) -> None:
    arguments = draw(seed, spread)
    torch.testing.assert_close(attend(*arguments), by_grid_sample(*arguments), rtol=1e-5, atol=1e-5)


def test_so_do_the_centres_and_the_borders_of_pixels() -> None:
    values, sizes, locations, weights = draw(0, 0.0)
    for x, y in ((0, 0), (1, 1), (0.5, 0.5), (0.1, 1 / 6), (0.3, 0.5), (1 / 12, 1 / 16)):
        locations[..., 0], locations[..., 1] = x, y
        torch.testing.assert_close(
            attend(values, sizes, locations, weights), by_grid_sample(values, sizes, locations, weights), rtol=1e-4, atol=1e-5
        )


def test_gradients_are_those_of_grid_sample() -> None:
    found = []
    for read in (attend, by_grid_sample):
        values, sizes, locations, weights = draw(3, 0.2)
        for tensor in (values, locations, weights):
            tensor.requires_grad_()
        read(values, sizes, locations, weights).square().sum().backward()
        found.append((values.grad, locations.grad, weights.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
