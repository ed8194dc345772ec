"""Verification of a user's own detector must be able to fail: each fault of its decoding is caught by name.

The engine is made once. A fault is put into what it is held against, which comes to the same: they differ by it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from export.detect_options import DetectOptions
from export.detection_head import DetectionHead
from export.fuse import fuse
from export.load import load
from export.onnx_detector import OnnxDetector
from export.onnx_network import OnnxNetwork
from export.spec import Engine, ExportRequest, Fused, LoadedDetector, OnnxInterface, VerificationError
from export.stage import stage
from export.to_onnx import to_onnx
from export.verify_onnx_detector import verify_onnx_detector
from tests.export.small_yolo import save

Made = tuple[ExportRequest, LoadedDetector, Fused, Engine]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("made")
    save("yolov5-raw", directory / "theirs.onnx")
    options = DetectOptions(head="yolov5-raw", anchors=(8, 12, 24, 16, 32, 20, 40, 56))
    request = ExportRequest(f"onnx/{directory / 'theirs.onnx'}", directory / "repository", detection=options, max_batch=3)
    loaded = load(request)
    assert isinstance(loaded, LoadedDetector)
    (fused,) = fuse(loaded)
    return request, loaded, fused, to_onnx(fused, directory / "model.onnx", "fp32")


def failed_checks(made: Made, *, colour: Any = None, **faults: Any) -> set[str]:
    """What verification says of the engine when the head that it is held against has `faults`. Nothing when it passes."""
    request, loaded, fused, engine = made
    assert isinstance(loaded.network, OnnxDetector)
    head = replace(loaded.network.head, **faults)
    names = [output.name for output in head.outputs]
    network = OnnxNetwork(loaded.network.network.model, OnnxInterface(colour=colour), names)
    with stage([engine], loaded, request) as (staged,):
        try:
            verify_onnx_detector(staged, OnnxDetector(network, head).eval(), fused.inner)
        except VerificationError as error:
            return {check.name for check in error.verification.checks if not check.passed}
    return set()


def wrong_strides(head: DetectionHead) -> Any:
    return tuple(replace(level, stride=level.stride * 2) for level in head.levels)


def swapped_anchors(head: DetectionHead) -> Any:
    return tuple(replace(level, anchors=level.anchors[::-1]) for level in head.levels)


def test_the_control_has_no_fault(made: Made) -> None:
    assert failed_checks(made) == set()


@pytest.mark.parametrize("change", [wrong_strides, swapped_anchors])
def test_wrong_cells_are_seen(made: Made, change: Callable[[DetectionHead], Any]) -> None:
    assert isinstance(made[1].network, OnnxDetector)
    assert "engine, batch 1: query boxes" in failed_checks(made, levels=change(made[1].network.head))


@pytest.mark.parametrize("fault", [{"box_format": "xyxy"}, {"box_format": "xywh"}, {"box_units": "shares"}], ids=str)
def test_wrong_boxes_are_seen(made: Made, fault: dict[str, Any]) -> None:
    failed = failed_checks(made, **fault)
    assert {"engine, batch 1: query boxes", "served path: query boxes"} <= failed
    assert "engine, batch 1: query scores" not in failed


def test_forgotten_sigmoids_are_seen(made: Made) -> None:
    assert "engine, batch 3: query scores" in failed_checks(made, logits=False)


@pytest.mark.parametrize("fault", [{"nms": 0.0}, {"nms": 0.2}, {"agnostic": True}, {"multi_label": True}], ids=str)
def test_another_suppression_is_seen(made: Made, fault: dict[str, Any]) -> None:
    assert {"drawn queries: row agreement", "engine, batch 1: row agreement"} & failed_checks(made, **fault)


def test_swapped_channels_are_seen(made: Made) -> None:
    assert {"engine, batch 1: query boxes", "engine, batch 1: query scores"} <= failed_checks(made, colour="BGR")
