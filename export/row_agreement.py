"""How verification compares queries and rows of a detector, and the tolerances of each precision."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.manifest import Check
from export.agreement import at_least, at_most
from export.detector import Detector

Array = NDArray[Any]


@dataclass(frozen=True)
class RowTolerance:
    """`box`: sum of the differences of a box's coordinates, in shares of the frame. `score`: absolute. `mask`: root of the mean
    squared difference of a mask's coefficients, as a share of the reference's. `share` of the queries or rows must keep to them.

    `path_box` and `path_score`: what the median query of an image may move along the whole served path, whose pixels differ by a
    level here and there. `golden`: absolute, of the smoke test; `outliers` the share of the values that may be off by more.
    """

    box: float
    score: float
    mask: float
    share: float
    path_box: float
    path_score: float
    golden: float
    outliers: float


TOLERANCES: dict[str, RowTolerance] = {
    "fp32": RowTolerance(1e-3, 1e-3, 1e-3, share=1.0, path_box=0.05, path_score=0.05, golden=0.01, outliers=0.05),
    "fp16": RowTolerance(0.05, 0.05, 0.05, share=0.9, path_box=0.06, path_score=0.06, golden=0.03, outliers=0.15),
    "bf16": RowTolerance(0.2, 0.2, 0.3, share=0.8, path_box=0.25, path_score=0.25, golden=0.1, outliers=0.4),
}
SENSITIVITY = 3  # what must be seen moves the median query by this many times the tolerance
STARTS = 0.95  # of the queries start at the same places; others, where places look alike to a rounding error, may differ
DISTINCT = 0.01  # of the frame: how far a query's box must lie from its neighbour's, in the median


@dataclass(frozen=True)
class Told:
    """What one side says of every query: `scores` [B,Q,classes], `boxes` [B,Q,4], `masks` [B,Q,C] or None, and `proposals` [B,S] or
    None."""

    scores: Array
    boxes: Array
    masks: Array | None
    proposals: Array | None = None

    @classmethod
    def of(cls, network: Detector, images: Tensor, content: Tensor | None, starts: Array | None = None) -> "Told":
        """Of normalised images float32 [B,3,H,W], each on its own; with queries that start at `starts` [B,Q], if given."""
        parts = []
        for i in range(len(images)):
            with nullcontext() if starts is None else network.starting_at(torch.from_numpy(starts[i : i + 1])):
                parts.append(network.detect(images[i : i + 1], None if content is None else content[i : i + 1]))
        scores = torch.cat([network.scores(part.logits) for part in parts])
        masks, proposals = (_joined([getattr(part, name) for part in parts]) for name in ("masks", "proposals"))
        return cls(scores.numpy(), torch.cat([part.boxes for part in parts]).numpy(), masks, proposals)

    @property
    def starts(self) -> Array | None:
        """[B,Q]: the places where the queries start, the likeliest first and of equals the first, as ONNX defines TopK."""
        if self.proposals is None:
            return None
        chosen: Array = np.argsort(-self.proposals, axis=1, kind="stable")[:, : self.boxes.shape[1]]
        return chosen

    def rows(self, index: Array) -> "Told":
        """Of these images."""
        masks, proposals = (None if values is None else values[index] for values in (self.masks, self.proposals))
        return Told(self.scores[index], self.boxes[index], masks, proposals)


def _joined(parts: list[Tensor | None]) -> Array | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given).numpy() if given else None


def at_same_places(one: Told, other: Told) -> tuple[Told, Told]:
    """Both for the images at which their queries start from the same places, in the order of the places.

    Places that look alike to the last bit change order, and the last of them may be left out for another.
    """
    if one.starts is None or other.starts is None:
        return one, other
    orders = np.argsort(one.starts, axis=1), np.argsort(other.starts, axis=1)
    starts = np.take_along_axis(one.starts, orders[0], 1), np.take_along_axis(other.starts, orders[1], 1)
    same = (starts[0] == starts[1]).all(1)
    return _ordered(one, orders[0]).rows(same), _ordered(other, orders[1]).rows(same)


def _ordered(told: Told, order: Array) -> Told:
    scores, boxes, masks = (
        None if values is None else np.take_along_axis(values, order[..., None], 1)
        for values in (told.scores, told.boxes, told.masks)
    )
    assert scores is not None
    assert boxes is not None
    return replace(told, scores=scores, boxes=boxes, masks=masks)


def box_distance(one: Array, other: Array) -> Array:
    """[...] of boxes [...,4]."""
    apart: Array = np.abs(one - other).sum(-1)
    return apart


def score_distance(one: Array, other: Array) -> Array:
    """[...] of scores [...,classes]: that of the class that differs most."""
    apart: Array = np.abs(one - other).max(-1)
    return apart


def mask_distance(one: Array, other: Array, reference: Array) -> Array:
    """[...] of coefficients [...,C], as a share of the mean power of the reference's."""
    apart: Array = np.sqrt(np.square(one - other).mean(-1) / np.square(reference).mean())
    return apart


def proposal_distance(one: Array, other: Array, reference: Array) -> Array:
    """[...] of proposals, as a share of the standard deviation of the reference's."""
    apart: Array = np.abs(one - other) / reference.std()
    return apart


def _in_common(one: Told, other: Told) -> float:
    """Share of the places where queries of the one start that are also such places of the other."""
    assert one.starts is not None
    assert other.starts is not None
    return float(np.mean([np.isin(mine, theirs).mean() for mine, theirs in zip(one.starts, other.starts, strict=True)]))


def compare_queries(what: str, served: Told, reference: Told, tolerance: RowTolerance) -> Iterator[Check]:
    """Query by query, before any is chosen. Names end in what they compare.

    Proposals are compared place by place, before any of them is chosen either, and the queries by the engine's choice.
    """
    if served.proposals is not None and reference.proposals is not None:
        apart = proposal_distance(served.proposals, reference.proposals, reference.proposals)
        yield _within(f"{what}: proposals", apart, tolerance.score, tolerance, "of their spread")
        yield at_least(f"{what}: starts in common", _in_common(served, reference), STARTS, "of queries")
    yield _within(f"{what}: query boxes", box_distance(served.boxes, reference.boxes), tolerance.box, tolerance, "of the frame")
    yield _within(f"{what}: query scores", score_distance(served.scores, reference.scores), tolerance.score, tolerance)
    if reference.masks is not None and served.masks is not None:
        apart = mask_distance(served.masks, reference.masks, reference.masks)
        yield _within(f"{what}: query masks", apart, tolerance.mask, tolerance, "of their power")


def compare_rows(
    what: str, served: dict[str, Array], reference: Told, network: Detector, tolerance: RowTolerance
) -> Iterator[Check]:
    """The rows of an engine, the best first, against the reference's queries.

    Scores must be the reference's in order. Each row must be one of the reference's queries, with its box, its score of the class
    and its mask; rows of like scores may change places.
    """
    boxes, scores, classes = served["boxes"], served["scores"], served["classes"]
    valid = (classes >= 0) & (classes < reference.scores.shape[2])
    yield at_least(f"{what}: classes that there are", valid.mean(), 1.0, "of rows")
    expected = _best(reference.scores, network)
    yield _within(f"{what}: row scores", np.abs(scores - expected), tolerance.score, tolerance)
    yield at_most(f"{what}: rows out of order", np.diff(scores).max(initial=0), 0.0)
    found = np.stack(
        [
            _misfits(image, served, classes.clip(0, reference.scores.shape[2] - 1), reference, tolerance)
            for image in range(len(boxes))
        ]
    )
    yield _within(f"{what}: row boxes", found, 1.0, tolerance, "of the tolerance")


def _best(scores: Array, network: Detector) -> Array:
    """[B,rows]: the highest scores, in order, of [B,Q,classes]."""
    candidates = scores.reshape(len(scores), -1) if network.pairs else scores.max(-1)
    best: Array = -np.sort(-candidates, axis=1)[:, : network.rows]
    return best


def _misfits(image: int, served: dict[str, Array], classes: Array, reference: Told, tolerance: RowTolerance) -> Array:
    """[rows]: how far each row of an image is from the query that it fits best, in tolerances."""
    boxes = box_distance(served["boxes"][image][:, None], reference.boxes[image][None]) / tolerance.box
    scores = np.abs(served["scores"][image][:, None] - reference.scores[image].T[classes[image]]) / tolerance.score
    apart = np.maximum(boxes, scores)
    if reference.masks is not None:
        masks = mask_distance(served["masks"][image][:, None], reference.masks[image][None], reference.masks)
        apart = np.maximum(apart, masks / tolerance.mask)
    least: Array = apart.min(1)
    return least


def _within(name: str, apart: Array, limit: float, tolerance: RowTolerance, unit: str = "") -> Check:
    """The difference that the share of the tolerance keeps to: the largest where that is all."""
    return at_most(name, np.quantile(apart, tolerance.share, method="higher"), limit, unit)
