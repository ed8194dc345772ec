"""The detector's lessons: boxes turn with their pictures, places are matched to shapes, and a step makes the loss smaller."""

from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from scene_detector import (
    PLACES_PER_SHAPE,
    Scenes,
    Targets,
    Teacher,
    build,
    detection_loss,
    evaluate,
    one_to_many,
    one_to_one,
    overlap,
)
from scenes import Drawn


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return scenes.drawn(tmp_path_factory.mktemp("scenes"), "train", 4)


def test_boxes_turn_with_their_pictures(data: Drawn) -> None:
    """Where pictures are white in the box of their one shape and black elsewhere, white is found in the box that is told."""
    pixels = np.zeros_like(data.pixels)
    alone = [scenes.Scene(s.number, s.seed, s.size, s.texture, s.shapes[-1:]) for s in data.scenes]
    for canvas, scene in zip(pixels, alone, strict=True):
        x0, y0, x1, y1 = scene.shapes[0].box
        canvas[y0:y1, x0:x1] = 255
    images, targets = Scenes(Drawn(alone, pixels, data.owners)).batch(32, 256, np.random.default_rng(0))
    for image, corners in zip(images, targets.corners[:, 0] * 256, strict=True):
        rows, columns = torch.where(image[0] > 0.5)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.allclose(corners, torch.tensor(found).float(), atol=1e-3)


def some_targets() -> Targets:
    boxes = torch.tensor([[[0.3, 0.3, 0.3, 0.3], [0.7, 0.6, 0.3, 0.5]], [[0.5, 0.5, 0.6, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    return Targets(torch.tensor([[1, 2], [3, 0]]), boxes, torch.tensor([[True, True], [True, False]]))


def test_each_shape_has_the_query_that_shows_it() -> None:
    targets = some_targets()
    boxes = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.05
    logits = torch.full((2, 5, 8), -4.0)
    for image, query, shape in ((0, 3, 0), (0, 1, 1), (1, 4, 0)):
        boxes[image, query] = targets.boxes[image, shape]
        logits[image, query, targets.labels[image, shape]] = 4.0
    matched = torch.stack(one_to_one(logits, boxes, targets)).T.tolist()
    assert sorted(matched) == [[0, 1, 1], [0, 3, 0], [1, 4, 0]]


def test_a_shape_takes_only_places_within_its_box() -> None:
    targets = some_targets()
    step = (torch.arange(16) + 0.5) / 16
    centres = torch.cartesian_prod(step, step)
    boxes = torch.cat([centres, torch.full_like(centres, 0.3)], 1).expand(2, -1, -1)
    image, place, shape, share = one_to_many(torch.full((2, 256, 8), -2.0), boxes, centres, targets)
    corners = targets.corners[image, shape]
    assert ((centres[place] > corners[:, :2]) & (centres[place] < corners[:, 2:])).all()
    assert targets.real[image, shape].all()
    counts = torch.bincount(image * 2 + shape)
    assert counts.tolist()[:3] == [PLACES_PER_SHAPE] * 3
    assert len(set(zip(image.tolist(), place.tolist(), strict=True))) == len(image)
    best = overlap(corners, torch.cat([centres[place] - 0.15, centres[place] + 0.15], 1))
    assert share.max() == pytest.approx(best.max().item(), abs=1e-5)


def test_overlap_is_shared_area_by_joint_area() -> None:
    one = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    other = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 2.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0]])
    assert torch.allclose(overlap(one, other), torch.tensor([1 / 3, 0.0, 1.0]))


def test_the_loss_of_the_right_answer_is_least() -> None:
    targets = some_targets()
    places = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    labels, wanted = targets.labels[targets.real], targets.boxes[targets.real]
    logits = torch.full((2, 2, 8), -8.0)
    logits[(*places, labels)] = 8.0
    right = detection_loss(logits, targets.boxes, labels, wanted, places)
    assert right < 0.01
    assert detection_loss(logits, targets.boxes * 0.9, labels, wanted, places) > right + 0.1
    assert detection_loss(logits.flip(-1), targets.boxes, labels, wanted, places) > right + 1


def test_a_few_steps_make_the_loss_smaller_and_the_detector_can_be_evaluated(data: Drawn) -> None:
    torch.manual_seed(0)
    teacher = Teacher(build())
    assert sum(parameter.numel() for parameter in teacher.detector.parameters()) <= 2_000_000
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    images, targets = Scenes(data).batch(4, 64, np.random.default_rng(0))
    sums = []
    for _ in range(8):
        losses = teacher(images, targets)
        assert set(losses) == {"dense", "proposals", "queries", "denoising"}
        optimizer.zero_grad()
        loss = torch.stack(tuple(losses.values())).sum()
        loss.backward()
        optimizer.step()
        sums.append(float(loss.detach()))
    assert sums[-1] < 0.9 * sums[0]
    figures = evaluate(teacher.detector, data)
    assert set(figures) == {"ap", "ap50", "ap75"}
    assert all(0 <= value <= 1 for value in figures.values())


def test_a_perfect_detector_is_told_so(data: Drawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The evaluation alone, with the truth in place of the network's answers."""
    labels = {kind: index for index, kind in enumerate(scenes.KINDS)}
    answers = [
        (
            torch.ones(len(scene.shapes)),
            torch.tensor([labels[shape.kind] for shape in scene.shapes]),
            torch.tensor([shape.box for shape in scene.shapes]) / 256,
        )
        for scene in data.scenes
    ]
    monkeypatch.setattr("scene_detector.detections", lambda _model, _pixels: answers)
    assert evaluate(build(), data) == {"ap": 1.0, "ap50": 1.0, "ap75": 1.0}
