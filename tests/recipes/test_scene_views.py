"""Pictures turn together with what is known of them, and a head that says what is there has no loss."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from scene_views import Seen, Symmetry, Views, middles
from scenes import COLOURS, KINDS, Drawn

SYMMETRIES = [Symmetry(*each) for each in product((False, True), repeat=3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return scenes.drawn(tmp_path_factory.mktemp("scenes"), "train", 8, size=64)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_scene_turns_with_its_picture(symmetry: Symmetry) -> None:
    picture = scenes.draw(5, size=64)
    owners = symmetry.pixels(picture.owners)
    for index, shape in enumerate(symmetry.scene(picture.scene).shapes, start=1):
        rows, columns = np.nonzero(owners == index)
        assert shape.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_the_symmetries_differ() -> None:
    picture = scenes.draw(5, size=64)
    assert len({symmetry.pixels(picture.pixels).tobytes() for symmetry in SYMMETRIES}) == 8


def test_a_batch_tells_what_its_pictures_show(data: Drawn) -> None:
    """Pictures that are white where their first shape is: cover and corners are those of the white."""
    white = np.where(data.owners[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, -1)
    views = Views(replace(data, pixels=white), 64, 4)
    batch = views.batch(16, np.random.default_rng(0))
    for row, scene in enumerate(batch.scenes):
        light = batch.pixels[row, ..., 0] > 127
        share = light.reshape(4, 16, 4, 16).mean((1, 3)).ravel()
        assert np.abs(batch.cover[row, 0].numpy() - share).max() < 0.15  # owners are kept at a quarter of the rows and columns
        rows, columns = np.nonzero(light)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.allclose(batch.corners[row, 0] * 64, box)
        assert list(KINDS)[batch.kinds[row, 0]] == scene.shapes[0].kind
        assert list(COLOURS)[batch.colours[row, 0]] == scene.shapes[0].colour


def test_the_middle_of_each_box_is_in_one_place(data: Drawn) -> None:
    batch = Views(data, 64, 8).batch(16, np.random.default_rng(2))
    found = middles(batch.corners, 64)
    for places, scene in zip(found.tolist(), batch.scenes, strict=True):
        across, down = zip(*(shape.middle for shape in scene.shapes), strict=True)
        assert places[: len(scene.shapes)] == [8 * int(8 * y / 64) + int(8 * x / 64) for x, y in zip(across, down, strict=True)]
        assert set(places[len(scene.shapes) :]) <= {64}


@pytest.mark.parametrize("absolute", [False, True])
def test_who_says_what_is_there_has_no_loss(data: Drawn, absolute: bool) -> None:
    batch = Views(data, 64, 8).batch(4, np.random.default_rng(1))
    order = torch.arange(64).flip(0)  # any order will do, as long as it is told
    share, owner = batch.cover[..., order].max(1)
    shows = share >= 0.25
    said = torch.zeros(4, 64, 40)
    for name, first, labels in (("kind", 0, batch.kinds), ("colour", 9, batch.colours)):
        wanted = torch.where(shows, labels.gather(1, owner) + 1, 0)
        said.scatter_(2, first + wanted[..., None], 50.0)
        assert wanted.any(), name
    at = middles(batch.corners, 64)
    for row, place in ((row, place) for row in range(4) for place in range(64)):
        here = (at[row] == place).nonzero()[:, 0].tolist()
        kind, colour = (int(labels[row, here[-1]]) + 1 if here else 0 for labels in (batch.kinds, batch.colours))
        said[row, 63 - place, [22 + kind, 31 + colour]] = 50.0
    seen = Seen(80, 8, each=2, absolute=absolute, middles=True)
    said[..., 18:22] = batch.corners.gather(1, owner[..., None].expand(-1, -1, 4)) - seen.origin[order]
    seen.norm = torch.nn.Identity()  # type: ignore[assignment]
    torch.nn.init.eye_(seen.linear.weight)
    torch.nn.init.zeros_(seen.linear.bias)
    losses = seen(said.view(4, 32, 80), order, batch)
    assert set(losses) == {"kind", "colour", "edges", "middle_kind", "middle_colour"}
    assert all(float(loss.detach()) < 1e-4 for loss in losses.values())
    wrong = seen(said.roll(1, 0).view(4, 32, 80), order, batch)
    assert all(float(loss.detach()) > 0.1 for loss in wrong.values())


def test_pictures_are_kept_at_the_size_of_training(data: Drawn, tmp_path: Path) -> None:
    views = Views(data, 32, 4)
    assert views.pixels.shape == (8, 32, 32, 3)
    assert np.abs(views.pixels.mean((1, 2)) - data.pixels.mean((1, 2))).max() < 2
