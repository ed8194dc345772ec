"""A user's own ONNX detector: what its head is used to, what the flags must say, and values that contradict them."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from export.detect_options import DetectOptions
from export.load import load
from export.spec import ExportError, ExportRequest, LoadedDetector, OnnxInterface, PreprocessingOverrides
from tests.export.small_yolo import FRAME, save


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("theirs")
    for form in ("yolov8", "detr"):
        save(form, directory / f"{form}.onnx")
    return directory


def request(file: Path, options: dict[str, Any], flags: dict[str, Any] | None = None, **fields: Any) -> ExportRequest:
    overrides = PreprocessingOverrides(**flags or {})
    return ExportRequest(f"onnx/{file}", file.parent, detection=DetectOptions(**options), preprocessing=overrides, **fields)


def test_a_head_says_how_images_are_prepared(home: Path) -> None:
    loaded = load(request(home / "yolov8.onnx", {"head": "yolov8", "letterbox": "corner", "pad": (0,)}))
    assert isinstance(loaded, LoadedDetector)
    picture = loaded.preprocessing
    assert ((picture.height, picture.width), picture.policy, picture.anchor, picture.fill) == (
        FRAME,
        "letterbox",
        "corner",
        (0, 0, 0),
    )
    assert (picture.mean, picture.std, picture.scale) == ((0.0,) * 3, (1.0,) * 3, 1 / 255)
    assert loaded.detection.model_dump(exclude={"masks"}) == {
        "queries": 120,
        "classes": 3,
        "box": "xyxy",
        "score": "sigmoid",
        "content": False,
    }


def test_names_of_the_file_are_labels(home: Path, tmp_path: Path) -> None:
    model = onnx.load(home / "yolov8.onnx")
    helper.set_model_props(model, {"names": "{0: 'cat', 1: 'dog', 2: 'hen'}"})
    onnx.save(model, tmp_path / "named.onnx")
    assert load(request(tmp_path / "named.onnx", {"head": "yolov8"})).labels == ("cat", "dog", "hen")


@pytest.mark.parametrize(
    ("form", "options", "flags", "fields", "says"),
    [
        ("yolov8", {}, {}, {}, r"--head .*it gives \d+ \[1, 7, 120\]"),
        ("yolov8", {"head": "yolov8"}, {"input_size": (32, 32)}, {}, "takes images of 64x96, not 32x32"),
        ("yolov8", {"head": "yolov8"}, {"resize": 80}, {}, "either --resize 64x96 stretches it, or --letterbox"),
        ("yolov8", {"head": "yolov8", "letterbox": "centre"}, {"resize": FRAME}, {}, "either --resize"),
        ("yolov8", {"head": "yolov8", "pad": (0,)}, {"resize": FRAME}, {}, "leave --pad out"),
        ("yolov8", {"head": "yolov8", "pad": (0, 300, 0)}, {}, {}, "one level of 0 to 255"),
        ("yolov8", {"head": "yolov8"}, {}, {"num_classes": 9}, "no axis of 13 numbers"),
        ("yolov8", {"head": "yolov8", "box_units": "shares"}, {}, {}, "times the frame, so they are hardly shares"),
        ("detr", {"head": "rt-detr", "box_format": "xyxy"}, {}, {}, "hardly xyxy"),
        ("yolov8", {"head": "yolov8"}, {}, {"onnx": OnnxInterface(output="logits")}, "give --output probabilities"),
        ("detr", {"head": "detr"}, {}, {}, r"give --letterbox .*, --mean, --std"),
        ("detr", {"head": "rt-detr", "box_units": "pixels"}, {}, {}, "rather shares"),
        (
            "detr",
            {"head": "rt-detr"},
            {},
            {"onnx": OnnxInterface(output="probabilities")},
            "no probabilities; give --output logits",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    home: Path, form: str, options: dict[str, Any], flags: dict[str, Any], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ExportError, match=says):
        load(request(home / f"{form}.onnx", options, flags, **fields))
