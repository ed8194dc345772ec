"""The nodes behind a user's own detector say what its outputs decoded by torch say, and suppress as torchvision does."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.detect_options import DetectOptions
from export.detection_graph import append_head
from export.detection_head import DetectionHead, Output, resolve_head
from export.detector import Queries
from export.onnx_detector import OnnxDetector
from export.row_agreement import RowTolerance
from export.spec import OnnxInterface
from export.verify_onnx_detector import row_agreement

FRAME = (64, 96)
ANCHORS = (8.0, 12.0, 24.0, 16.0, 32.0, 20.0, 40.0, 56.0)
MAPS = {"fine": (1, 16, 8, 12), "coarse": (1, 16, 4, 6)}
EXACT = RowTolerance(1e-5, 1e-5, 0, share=1.0, path_box=0, path_score=0, golden=0, outliers=0)

CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "yolov8": ({"head": "yolov8"}, {"out": (1, 7, 120)}),
    "yolov8 of several labels": ({"head": "yolov8", "multi_label": True, "max_detections": 40}, {"out": (1, 7, 120)}),
    "yolov8 of any class": ({"head": "yolov8", "agnostic_nms": True, "nms": 0.3}, {"out": (1, 7, 120)}),
    "yolov8 without suppression": ({"head": "yolov8", "nms": 0.0}, {"out": (1, 7, 120)}),
    "yolov5": ({"head": "yolov5", "box_format": "xywh", "score_threshold": 0.3}, {"out": (1, 240, 8)}),
    "yolov5-raw": ({"head": "yolov5-raw", "anchors": ANCHORS}, MAPS),
    "yolov5-raw, the coarse level first": ({"head": "yolov5-raw", "anchors": ANCHORS}, dict(reversed(MAPS.items()))),
    "yolov5-raw in cells": ({"head": "yolov5-raw", "anchors": ANCHORS}, {"a": (1, 2, 8, 12, 8), "b": (1, 2, 4, 6, 8)}),
    "yolov3-raw": ({"head": "yolov3-raw", "anchors": ANCHORS}, MAPS),
    "yolox": ({"head": "yolox", "strides": (8, 16)}, {"out": (1, 120, 8)}),
    "yolox in maps": ({"head": "yolox"}, {"a": (1, 8, 8, 12), "b": (1, 8, 4, 6)}),
    "yolov8-raw": ({"head": "yolov8-raw"}, {"a": (1, 67, 8, 12), "b": (1, 67, 4, 6)}),
    "detr": ({"head": "detr"}, {"logits": (1, 30, 6), "pred_boxes": (1, 30, 4)}),
    "rt-detr": ({"head": "rt-detr", "max_detections": 50}, {"logits": (1, 30, 6), "pred_boxes": (1, 30, 4)}),
    "boxes": (
        {"head": "boxes", "box_format": "xyxy", "box_units": "shares", "background": "first", "nms": 0.5}
        | {"boxes_name": "b", "scores_name": "s"},
        {"s": (1, 5, 50), "b": (1, 4, 50), "other": (1, 3)},
    ),
    "end2end": ({"head": "end2end"}, {"out": (1, 20, 6)}),
    "end2end in parts": (
        {"head": "end2end", "boxes_name": "b", "scores_name": "s", "classes_name": "c"},
        {"s": (1, 20), "c": (1, 20), "b": (1, 20, 4)},
    ),
}


def resolve(name: str) -> DetectionHead:
    fields, shapes = CASES[name]
    interface = OnnxInterface(output="logits" if name == "boxes" else None)
    activation = "softmax" if name == "boxes" else None
    classes = 4 if name.startswith("end2end") else None
    return resolve_head(DetectOptions(**fields), interface, shapes, FRAME, activation=activation, num_classes=classes)


def draw(head: DetectionHead, images: int) -> list[np.ndarray]:
    """What a network might give: boxes that overlap where they are boxes already, numbers around zero where they are coded."""
    random = np.random.default_rng(0)
    if head.levels:
        return [random.standard_normal((images, *output.shape)).astype(np.float32) for output in head.outputs]
    size = np.tile(FRAME[::-1], 2) if head.box_units == "pixels" else np.ones(4)
    place, extent = random.uniform(0.1, 0.5, (images, head.queries, 2)), random.uniform(0.2, 0.5, (images, head.queries, 2))
    boxes = np.concatenate([place, place + extent if head.box_format == "xyxy" else extent], 2) * size
    if head.coding == "final":
        found = random.integers(0, head.classes, (images, head.queries, 1))
        rest = np.concatenate([random.uniform(0, 1, (images, head.queries, 1)), found], 2)
    else:
        numbers = head.objectness + head.classes + (head.background != "none")
        rest = (
            random.standard_normal((images, head.queries, numbers))
            if head.logits
            else random.uniform(0, 1, (images, head.queries, numbers))
        )
    parts = [boxes, rest] if len(head.outputs) == 2 else [boxes, rest[..., :1], rest[..., 1:]]
    tables = parts if head.beside else [np.concatenate([boxes, rest], 2)]
    return [arrange(table, output).astype(np.float32) for table, output in zip(tables, head.outputs, strict=True)]


def arrange(table: np.ndarray, output: Output) -> np.ndarray:
    """[B,A,K] along the axes of an output."""
    if output.axes == "values":
        return table[..., 0]
    return table.transpose(0, 2, 1) if output.axes == "columns" else table


def run(head: DetectionHead, raw: list[np.ndarray], opset: int = 17) -> dict[str, np.ndarray]:
    """The nodes alone, fed with outputs of a network."""
    values = [
        ir.Value(name=output.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("batch", *output.shape)))
        for output in head.outputs
    ]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": opset}, name="head")
    append_head(graph, values, head)
    graph.outputs.pop()
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=8))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {output.name: rows for output, rows in zip(head.outputs, raw, strict=True)}
    return dict(zip(names, session.run(names, given), strict=True))


def decoded(head: DetectionHead, raw: list[np.ndarray]) -> tuple[OnnxDetector, Queries]:
    detector = OnnxDetector(None, head)
    features = torch.cat([torch.from_numpy(rows).flatten(1).double() for rows in raw], 1)
    return detector, detector.decode(features, FRAME, None)


@pytest.mark.parametrize("name", CASES)
def test_nodes_say_what_torch_says(name: str) -> None:
    head = resolve(name)
    raw = draw(head, images=3)
    served = run(head, raw)
    detector, queries = decoded(head, raw)

    np.testing.assert_allclose(served["query_boxes"], queries.boxes, atol=2e-5)
    np.testing.assert_allclose(served["query_scores"], queries.logits, atol=2e-6)
    rows = detector.choose(
        Queries(*(torch.from_numpy(served[key]) for key in ("query_scores", "query_boxes"))),
        torch.from_numpy(served["query_scores"]),
    )
    expected = {"boxes": rows.boxes.numpy(), "scores": rows.scores.numpy(), "classes": rows.classes.numpy()}
    assert served["boxes"].shape == (3, head.rows, 4)
    assert row_agreement(served, expected, EXACT) == 1
    assert (np.diff(served["scores"]) <= 0).all()
    assert (served["scores"] > 0).any(axis=1).all()
    if head.nms:
        alone = run(head, [rows[1:2] for rows in raw])
        np.testing.assert_allclose(alone["boxes"], served["boxes"][1:2], atol=1e-6)


@pytest.mark.parametrize("opset", [13, 20])
def test_nodes_mean_the_same_in_every_opset(opset: int) -> None:
    head = resolve("yolov5-raw")
    raw = draw(head, images=2)
    np.testing.assert_array_equal(run(head, raw, opset)["boxes"], run(head, raw)["boxes"])


def test_an_image_in_which_nothing_is_found_has_no_rows() -> None:
    head = resolve("yolov8")
    raw = [np.zeros((2, 7, 120), np.float32)]
    assert not run(head, raw)["scores"].any()
