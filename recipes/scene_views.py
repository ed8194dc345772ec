"""Batches of drawn scenes at a size to train at, in their eight symmetries, and lessons on what each place of them shows."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scenes import COLOURS, KINDS, Box, Drawn, Scene, Shape
from torch import Tensor, nn

Pixels = NDArray[np.uint8]
LEAST_COVER = 0.25
"""The share of a place that a shape must cover for the place to show it."""


@dataclass(frozen=True)
class Symmetry:
    """One of eight: rows and columns exchanged, then left and right, then top and bottom."""

    turned: bool
    mirrored: bool
    flipped: bool

    def pixels(self, pixels: Pixels) -> Pixels:
        """uint8 [H,W,...] in this symmetry."""
        if self.turned:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]

    def scene(self, scene: Scene) -> Scene:
        """What the pixels then show. Of a shape, `centre` and `rotation` stay as they were: words speak of boxes."""
        return dataclasses.replace(scene, shapes=tuple(self._shape(shape, scene.size) for shape in scene.shapes))

    def _shape(self, shape: Shape, size: int) -> Shape:
        x0, y0, x1, y1 = shape.box
        if self.turned:
            x0, y0, x1, y1 = y0, x0, y1, x1
        if self.mirrored:
            x0, x1 = size - x1, size - x0
        if self.flipped:
            y0, y1 = size - y1, size - y0
        box: Box = (x0, y0, x1, y1)
        return dataclasses.replace(shape, box=box)


@dataclass(frozen=True)
class Batch:
    """B pictures of at most T shapes, over a grid of N places in rows."""

    scenes: list[Scene]
    pixels: Pixels
    """uint8 [B,side,side,3]."""
    cover: Tensor
    """float32 [B,T,N]: the share of each place that each shape covers."""
    kinds: Tensor
    """int64 [B,T]."""
    colours: Tensor
    """int64 [B,T]."""
    corners: Tensor
    """float32 [B,T,4]: left, top, right, bottom in 0..1."""


class Views:
    """Drawn scenes in memory, resized as Pillow does, given out in random symmetries."""

    def __init__(self, data: Drawn, side: int, grid: int) -> None:
        """`side` of a picture in pixels, and of the grid in places."""
        self.scenes, self.grid = data.scenes, grid
        self.most = max(len(scene.shapes) for scene in data.scenes)
        self.pixels = resized(data.pixels, side)
        self.owners = data.owners[:, 2::4, 2::4].copy()
        self._kinds = {kind: index for index, kind in enumerate(KINDS)}
        self._colours = {colour: index for index, colour in enumerate(COLOURS)}

    def batch(self, count: int, rng: np.random.Generator) -> Batch:
        rows = rng.integers(len(self.scenes), size=count)
        symmetries = [Symmetry(*(bool(each) for each in draws)) for draws in rng.random((count, 3)) < 0.5]
        scenes = [symmetry.scene(self.scenes[row]) for row, symmetry in zip(rows, symmetries, strict=True)]
        pixels, owners = (
            np.stack([symmetry.pixels(each[row]) for row, symmetry in zip(rows, symmetries, strict=True)])
            for each in (self.pixels, self.owners)
        )
        kinds, colours = (torch.zeros(count, self.most, dtype=torch.int64) for _ in range(2))
        corners = torch.zeros(count, self.most, 4)
        for row, scene in enumerate(scenes):
            shapes = range(len(scene.shapes))
            kinds[row, shapes] = torch.tensor([self._kinds[shape.kind] for shape in scene.shapes])
            colours[row, shapes] = torch.tensor([self._colours[shape.colour] for shape in scene.shapes])
            corners[row, shapes] = torch.tensor([shape.box for shape in scene.shapes]) / scene.size
        shown = torch.from_numpy(owners)[:, None] == torch.arange(1, self.most + 1)[:, None, None]
        cover = F.interpolate(shown.float(), size=(self.grid, self.grid), mode="area").flatten(2)
        return Batch(scenes, pixels, cover, kinds, colours, corners)


def resized(pixels: Pixels, side: int) -> Pixels:
    """uint8 [N,H,W,3] as uint8 [N,side,side,3], by Pillow's bicubic filter as a gateway resizes."""

    def resize(index: int) -> Pixels:
        return np.asarray(Image.fromarray(pixels[index]).resize((side, side), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor() as pool:
        found = np.empty((len(pixels), side, side, 3), np.uint8)
        for index, picture in enumerate(pool.map(resize, range(len(pixels)))):
            found[index] = picture
    return found


class Seen(nn.Module):
    """The head, thrown away after training, by which features tell what places show: kind, colour and box of the shape there.

    A feature may speak of several places: `each` of them. Edges are told as distances from the middle of a place, which needs no
    knowledge of where in the frame it is; with `absolute`, from the frame's own left and top. With `middles`, places also tell of
    the shape whose middle lies in them, which is one place for each shape, however large: so shapes can be counted.
    """

    def __init__(self, width: int, grid: int, each: int = 1, *, absolute: bool = False, middles: bool = False) -> None:
        super().__init__()
        self._sizes = [len(KINDS) + 1, len(COLOURS) + 1, 4, *([len(KINDS) + 1, len(COLOURS) + 1] if middles else [])]
        self.each, self.norm, self.linear = each, nn.LayerNorm(width), nn.Linear(width, each * sum(self._sizes))
        step = (torch.arange(grid) + 0.5) / grid
        rows, columns = torch.meshgrid(step, step, indexing="ij")
        middles = torch.stack([columns, rows, columns, rows], -1).flatten(0, 1)
        self.origin = nn.Buffer(torch.zeros_like(middles) if absolute else middles, persistent=False)

    def forward(self, features: Tensor, order: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss of features [B,F,width]; `order` int64 [F*each]: of which place each answer is."""
        answers = self.linear(self.norm(features)).unflatten(-1, (self.each, -1)).flatten(1, 2)  # [B,F*each,...]
        kinds, colours, edges, *of_middles = answers.split(self._sizes, -1)
        share, owner = batch.cover[..., order].max(1)
        shows = share >= LEAST_COVER
        losses = {}
        for name, logits, labels in (("kind", kinds, batch.kinds), ("colour", colours, batch.colours)):
            wanted = torch.where(shows, labels.gather(1, owner) + 1, 0)
            losses[name] = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        wanted_edges = batch.corners.gather(1, owner[..., None].expand(-1, -1, 4))[shows]
        found = (edges + self.origin[order])[shows]
        losses["edges"] = 4 * (found - wanted_edges).abs().sum(-1).mean()
        at = middles(batch.corners, batch.cover.shape[-1])
        for (name, labels), logits in zip((("kind", batch.kinds), ("colour", batch.colours)), of_middles, strict=False):
            wanted = torch.zeros(len(at), batch.cover.shape[-1] + 1, dtype=torch.int64).scatter(1, at, labels + 1)[:, order]
            losses[f"middle_{name}"] = 5 * F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        return losses


def middles(corners: Tensor, places: int) -> Tensor:
    """int64 [B,T]: in which of `places`, a square grid of them in rows, the middles of boxes [B,T,4] lie; `places` for no box."""
    side = round(places**0.5)
    across, down = ((corners[..., :2] + corners[..., 2:]) / 2 * side).long().clamp(max=side - 1).unbind(-1)
    return torch.where(corners[..., 2] > 0, down * side + across, places)
