"""Verification of a user's own detector: queries against its outputs decoded by torch, rows against torchvision's suppression."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.utils import Extractor

from app.manifest import Check, Entry, TensorSpec
from export.agreement import at_least, at_most
from export.detector import Queries
from export.golden import GoldenImage, golden_images
from export.onnx_detector import OnnxDetector
from export.row_agreement import RowTolerance, Told, box_distance, score_distance
from export.served import Frames, staged_entry
from export.spec import Staged
from export.verify_detector import DetectorVerifier, run_verifier

Array = NDArray[Any]

# Scores are compared as log-odds: of trained detectors most are nearly 0, where a fault would move probabilities by nothing.
TOLERANCES: dict[str, RowTolerance] = {
    "fp32": RowTolerance(1e-3, 0.01, 0, share=1.0, path_box=0.05, path_score=0.5, golden=0.01, outliers=0.05),
    "fp16": RowTolerance(0.003, 0.06, 0, share=0.9, path_box=0.06, path_score=0.6, golden=0.03, outliers=0.15),
    "bf16": RowTolerance(0.03, 0.3, 0, share=0.8, path_box=0.25, path_score=1.0, golden=0.1, outliers=0.4),
}
_UNSORTED = 0.98  # of the queries, where the network itself orders them and swaps what is nearly equal
_ROWS = 0.99  # of the rows that are suppressed alike, given the same queries: an overlap may lie within rounding of the limit
_MISSED = 0.3  # of the rows of drawn queries at least must be others without suppression
_EXACT = RowTolerance(1e-5, 1e-5, 0, share=1.0, path_box=0, path_score=0, golden=0, outliers=0)
_FAINT, _SURE = 1e-7, 1e-4  # from 0 and from 1: what lies closer counts as equal
_DRAWN = 1000  # queries of an image that are candidates


def verify_onnx_detector(staged: Staged, network: OnnxDetector, inner: Sequence[TensorSpec]) -> Staged:
    """`verify_detector` for a user's own ONNX detector.

    Besides, the engine's choice is given queries that were drawn to overlap, and must give the rows that torchvision's
    `batched_nms` leaves of them.

    Raises:
        VerificationError, ExportError: see `verify_detector`.
    """
    return run_verifier(staged, _Verifier(staged_entry(staged), network, golden_images()), inner)


class _Verifier(DetectorVerifier):
    network: OnnxDetector

    def __init__(self, entry: Entry, network: OnnxDetector, images: Sequence[GoldenImage]) -> None:
        super().__init__(entry, network, images)
        head = network.head
        tolerance = TOLERANCES[entry.manifest.precision]
        self.tolerance = replace(tolerance, share=tolerance.share if head.nms else min(tolerance.share, _UNSORTED))
        self.shift = max(1, head.queries // 2)  # neighbouring cells look at the same object
        self.chosen = head.coding == "final"

    def run(self, run: Any) -> Iterator[Check]:
        yield from super().run(run)
        if self.entry.manifest.engine.kind == "onnx":
            yield from self._choice_of_drawn_queries()

    def told(self, served: Mapping[str, Array]) -> Told:
        return Told(log_odds(served["query_scores"]), served["query_boxes"], None)

    def ask_network(self, frames: Frames, content: NDArray[np.int32], starts: Array | None = None) -> Told:
        told = super().ask_network(frames, content, starts)
        return replace(told, scores=log_odds(told.scores))

    def match(self, told: Told, reference: Told) -> Told:
        """Rows that the network chose change places when scores are nearly equal: each is held against the one it fits best."""
        if not self.chosen:
            return reference
        nearest = []
        for image in range(len(told.boxes)):
            boxes = box_distance(told.boxes[image][:, None], reference.boxes[image][None])
            scores = score_distance(told.scores[image][:, None], reference.scores[image][None])
            nearest.append((boxes / self.tolerance.box + scores / self.tolerance.score).argmin(1)[:, None])
        index = np.stack(nearest)
        return Told(np.take_along_axis(reference.scores, index, 1), np.take_along_axis(reference.boxes, index, 1), None)

    def typical(self, moved: Array) -> Any:
        """Of rows that the network chose many may be empty, and stay so."""
        return np.max(moved) if self.chosen else np.median(moved)

    def compare_rows(self, what: str, served: Mapping[str, Array], reference: Told) -> Iterator[Check]:
        """Against torchvision's suppression of the engine's own queries; of the reference's where an engine does not show them."""
        yield at_most(f"{what}: rows out of order", np.diff(served["scores"]).max(initial=0), 0.0)
        if "query_boxes" in served:
            expected = self._rows_of(served["query_boxes"], served["query_scores"])
            yield at_least(f"{what}: row agreement", row_agreement(served, expected, _EXACT), _ROWS, "of rows")
        else:
            expected = self._rows_of(reference.boxes, 1 / (1 + np.exp(-reference.scores)))
            share = row_agreement(served, expected, self.tolerance)
            yield at_least(f"{what}: row agreement", share, self.tolerance.share * _ROWS, "of rows")

    def _rows_of(self, boxes: Array, scores: Array) -> dict[str, Array]:
        queries = Queries(torch.from_numpy(scores), torch.from_numpy(boxes))
        rows = self.network.choose(queries, queries.logits)
        return {"boxes": rows.boxes.numpy(), "scores": rows.scores.numpy(), "classes": rows.classes.numpy()}

    def _choice_of_drawn_queries(self) -> Iterator[Check]:
        """The nodes of the engine behind its queries, fed with ones that overlap as those of the golden images might not."""
        boxes, scores = draw_queries(self.network.head.queries, self.network.head.classes)
        given = {"query_boxes": boxes, "query_scores": scores}
        names = [spec.name for spec in self.entry.manifest.outputs]
        model = onnx.load(self.entry.engine_file)
        del model.graph.value_info[:]
        for name, rows in given.items():
            model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *rows.shape[1:]]))
        part = Extractor(model).extract_model(list(given), names)
        session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        served = dict(zip(names, session.run(names, given), strict=True))
        expected = self._rows_of(boxes, scores)
        yield at_least("drawn queries: row agreement", row_agreement(served, expected, _EXACT), _ROWS, "of rows")
        if self.network.head.nms:
            candidates = scores if self.network.head.multi_label else scores.max(2)
            best = -np.sort(-candidates.reshape(len(scores), -1), axis=1)[:, : self.network.rows]
            others = np.abs(best - expected["scores"])[best > self.network.head.score_threshold] > _EXACT.score
            yield at_least("drawn queries: rows that suppression changes", others.mean(), _MISSED, "of rows")


def log_odds(scores: Array) -> Array:
    """Probabilities as log-odds; the ends, which float32 cannot tell from 0 and 1, are cut off."""
    inside = scores.astype(np.float64).clip(_FAINT, 1 - _SURE)
    odds: Array = np.log(inside) - np.log1p(-inside)
    return odds


def row_agreement(served: Mapping[str, Array], expected: Mapping[str, Array], tolerance: RowTolerance) -> float:
    """The share of rows that hold something on either side and have their like on the other: class, box and score."""
    found = there = 0
    for image in range(len(served["boxes"])):
        mine, theirs = ({name: rows[name][image][rows["scores"][image] > 0] for name in expected} for rows in (served, expected))
        alike = mine["classes"][:, None] == theirs["classes"][None]
        alike &= box_distance(mine["boxes"][:, None], theirs["boxes"][None]) <= tolerance.box
        alike &= np.abs(mine["scores"][:, None] - theirs["scores"][None]) <= tolerance.score
        found += int(alike.any(0).sum() + alike.any(1).sum())
        there += sum(alike.shape)
    return found / there if there else 1.0


def draw_queries(queries: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes [3,queries,4] xyxy and scores [3,queries,classes]: of many that overlap in clusters, of a few, and of none.

    A cluster has boxes of up to three classes, and some boxes have two.
    """
    random = np.random.default_rng(0)
    candidates = min(queries, _DRAWN)
    clusters = max(2, candidates // 8)
    cluster = random.integers(0, clusters, (3, queries))
    size = random.uniform(0.05, 0.3, (clusters, 2))[cluster] * np.exp(random.normal(0, 0.15, (3, queries, 2)))
    centre = random.uniform(0.1, 0.9, (clusters, 2))[cluster] + random.normal(0, 0.15, (3, queries, 2)) * size
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=2).astype(np.float32)
    scores = np.zeros((3, queries, classes), np.float32)
    for image, count in enumerate((candidates, min(candidates, 5), 0)):
        for query in random.permutation(queries)[:count]:
            several = random.choice(min(classes, 3), size=1 + int(classes > 1 and random.random() < 0.3), replace=False)
            scores[image, query, several] = random.uniform(0, 1, len(several))
    return boxes, scores
