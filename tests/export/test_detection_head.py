"""Flags and shapes that do not fit together are refused in a sentence that says what was found."""

from typing import Any

import pytest

from export.detect_options import DetectOptions
from export.detection_head import resolve_head
from export.spec import ExportError, OnnxInterface

FRAME = (64, 96)
TABLE = {"output0": (1, 7, 120)}
MAPS = {"p3": (1, 16, 8, 12), "p4": (1, 16, 4, 6)}
ANCHORS = (8.0, 12.0, 24.0, 16.0, 32.0, 20.0, 40.0, 56.0)


def resolve(shapes: dict[str, tuple[int, ...]], classes: int | None = None, interface: Any = None, **fields: Any) -> Any:
    return resolve_head(DetectOptions(**fields), interface or OnnxInterface(), shapes, FRAME, num_classes=classes)


def test_the_axis_of_a_table_is_found_by_the_classes_or_by_its_length() -> None:
    assert resolve(TABLE, head="yolov8").outputs[0].axes == "columns"
    assert resolve({"output0": (1, 120, 7)}, head="yolov8").outputs[0].axes == "rows"
    few = resolve({"output0": (1, 5, 7)}, classes=3, head="yolov8")
    assert (few.outputs[0].axes, few.queries, few.classes) == ("rows", 5, 3)


def test_strides_are_read_off_maps_and_anchors_belong_to_the_finest_first() -> None:
    head = resolve(dict(reversed(MAPS.items())), head="yolov5-raw", anchors=ANCHORS)
    assert [(level.stride, level.anchors[0]) for level in head.levels] == [(16, (32.0, 20.0)), (8, (8.0, 12.0))]
    assert (head.classes, head.queries, head.nms) == (3, 240, 0.45)


@pytest.mark.parametrize(
    ("shapes", "fields", "says"),
    [
        (TABLE, {}, r"--head .*yolox.*output0 \[1, 7, 120\]"),
        (TABLE, {"head": "yolov8", "classes": 4}, r"output0 \[1, 7, 120\] has no axis of 8 numbers"),
        ({"output0": (1, 4, 120)}, {"head": "yolov8"}, "4 numbers a box: 4 of box leave 0 for classes"),
        ({"output0": (1, 7, 7)}, {"head": "yolov8"}, "--num-classes"),
        ({"a": (1, 7, 120), "b": (1, 9, 120)}, {"head": "yolov8"}, r"a \[1, 7, 120\], b \[1, 9, 120\]; name .*--output-name"),
        (TABLE, {"head": "yolov8", "interface": OnnxInterface(output_name="x")}, "no output 'x'; it gives output0"),
        (TABLE, {"head": "yolox", "strides": (8, 16, 32)}, "make 126 cells of a frame of 64x96"),
        (TABLE, {"head": "yolov5-raw", "anchors": ANCHORS}, r"a map a level.*output0 \[1, 7, 120\]"),
        (MAPS, {"head": "yolov5-raw"}, "needs --anchors"),
        (MAPS, {"head": "yolov5-raw", "anchors": ANCHORS[:6]}, "for each of 2 levels, not 6 numbers"),
        (MAPS, {"head": "yolov5-raw", "anchors": ANCHORS + ANCHORS[:4]}, "With 3 anchors a cell"),
        (MAPS, {"head": "yolov5-raw", "anchors": ANCHORS, "strides": (8, 32)}, r"p4 \[1, 16, 4, 6\] has a stride of 16"),
        ({"p3": (1, 16, 7, 12)}, {"head": "yolov5-raw", "anchors": ANCHORS}, "no grid of whole strides over a frame of 64x96"),
        (MAPS, {"head": "yolov5-raw", "anchors": ANCHORS, "box_format": "xyxy"}, "leave --box-format out"),
        (TABLE, {"head": "yolov8", "strides": (8,)}, "leave --strides out"),
        (TABLE, {"head": "yolov8", "anchors": ANCHORS}, "has no use for --anchors"),
        (TABLE, {"head": "yolov8", "nms": 0.0, "agnostic_nms": True}, "give --nms IOU"),
        (TABLE, {"head": "yolov8", "multi_label": True, "agnostic_nms": True}, "leave --agnostic-nms or --multi-label out"),
        (TABLE, {"head": "boxes"}, "--box-format"),
        (TABLE, {"head": "boxes", "box_format": "xyxy"}, "--box-units"),
        (TABLE, {"head": "boxes", "box_format": "xyxy", "box_units": "pixels"}, "--output"),
        ({"output0": (1, 20, 6)}, {"head": "end2end"}, "give --labels or --num-classes"),
        (TABLE, {"head": "yolov8", "boxes_name": "output0"}, "--boxes-name and --scores-name, all of them"),
        ({"b": (1, 9, 4), "s": (1, 8, 3)}, {"head": "rt-detr", "boxes_name": "b", "scores_name": "s"}, r"gives b \[1, 9, 4\], s"),
    ],
)
def test_what_does_not_fit_is_said(shapes: dict[str, tuple[int, ...]], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        resolve(shapes, **fields)
