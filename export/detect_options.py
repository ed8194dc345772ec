"""What a user says of their own ONNX detector, `onnx/FILE --task detect`: the options of the command line, and how they are read.

`export/detection_head.py` fills up what is left out and holds it against the shapes that the model gives. Nothing here needs torch,
so that `--help` and a wrong flag are quick.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import typer

Task = Literal["classify", "detect"]
HeadName = Literal["yolov8", "yolov8-raw", "yolov5", "yolov5-raw", "yolov3-raw", "yolox", "detr", "rt-detr", "end2end", "boxes"]
BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
BoxUnits = Literal["pixels", "shares"]
Background = Literal["none", "first", "last"]
Anchor = Literal["centre", "corner"]

_PANEL = "Detection by onnx/FILE (--task detect); --head says what the rest is by default"
_BY_HEAD = "as --head has it"


@dataclass(frozen=True)
class DetectOptions:
    """None: what the head has by default, or what the shapes of the outputs say.

    `strides` and `anchors` (width, height, in turn) are in pixels of the frame, the finest level first. `nms`: the IoU above which
    of two boxes the worse goes; 0 switches suppression off. `pad`: the levels of a letterbox's border.
    """

    head: HeadName | None = None
    boxes_name: str | None = None
    scores_name: str | None = None
    classes_name: str | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    background: Background | None = None
    strides: tuple[int, ...] | None = None
    anchors: tuple[float, ...] | None = None
    nms: float | None = None
    agnostic_nms: bool = False
    multi_label: bool | None = None
    score_threshold: float = 0.001
    max_detections: int = 300
    letterbox: Anchor | None = None
    pad: tuple[int, ...] | None = None


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PANEL, **{"show_default": False} | more)


TaskFlag = Annotated[Task, _option("What the model is for.", "--task", show_default=True)]
HeadFlag = Annotated[
    HeadName | None,
    _option("What its outputs are; `boxes` has no defaults. See docs/export.md.", metavar="|".join(get_args(HeadName))),
]
BoxesNameFlag = Annotated[str | None, _option("Its output of boxes, where boxes and scores come apart.")]
ScoresNameFlag = Annotated[str | None, _option("Its output of scores.")]
ClassesNameFlag = Annotated[str | None, _option("Its output of class numbers, of end2end.")]
BoxFormatFlag = Annotated[BoxFormat | None, _option("xywh begins at the top left corner.", show_default=_BY_HEAD)]
BoxUnitsFlag = Annotated[BoxUnits | None, _option("Of the frame: pixels, or shares of 0 to 1.", show_default=_BY_HEAD)]
BackgroundFlag = Annotated[Background | None, _option("The class that means no object.", show_default=_BY_HEAD)]
StridesFlag = Annotated[
    str | None,
    _option("Pixels a cell, the finest level first.", metavar="S,S,...", show_default="as the shapes say; yolox 8,16,32"),
]
AnchorsFlag = Annotated[str | None, _option("Pixels, the finest level first, of yolov5-raw and yolov3-raw.", metavar="W,H,W,H,...")]
NmsFlag = Annotated[str | None, _option("Boxes that overlap a better one by more go.", metavar="IOU|none", show_default=_BY_HEAD)]
AgnosticNmsFlag = Annotated[bool, _option("Boxes of other classes count as better ones, too.", "--agnostic-nms")]
MultiLabelFlag = Annotated[
    bool | None,
    _option("Whether a box may be given once for each class.", "--multi-label/--single-label", show_default=_BY_HEAD),
]
ScoreThresholdFlag = Annotated[
    float, _option("Scores up to it are left out before suppression.", min=0, max=1, show_default=True, metavar="SHARE")
]
MaxDetectionsFlag = Annotated[
    int, _option("Rows an image; fewer are filled up by scores of 0.", min=1, max=3839, show_default=True)
]
LetterboxFlag = Annotated[
    Anchor | None, _option("Where the image lies in its border; or --resize HxW to stretch it.", show_default=_BY_HEAD)
]
PadFlag = Annotated[str | None, _option("Levels of that border.", metavar="N|R,G,B", show_default="114")]

_NAMES = tuple(DetectOptions.__dataclass_fields__)


def read_detection(given: dict[str, Any], numbers: Callable[[str | None, str], tuple[float, ...] | None]) -> DetectOptions | None:
    """The options of `given` as one record; None without `--task detect`. `numbers` reads a list of the flag that it is told.

    Raises:
        typer.BadParameter: options of a detector without the task, the task of another source, a list that is none of numbers.
    """
    defaults = DetectOptions()
    used = [name for name in _NAMES if given[name] is not None and given[name] != getattr(defaults, name)]
    if given["task"] != "detect":
        if used:
            raise typer.BadParameter(f"{', '.join(map(_flag, used))} is only for --task detect.")
        return None
    if not given["source"].startswith("onnx/"):
        raise typer.BadParameter("--task is only for the source onnx/FILE; of others it is known.")
    fields = {name: given[name] for name in _NAMES}
    return DetectOptions(
        **fields
        | {
            "strides": _whole(numbers(given["strides"], "--strides"), "--strides", least=1),
            "anchors": numbers(given["anchors"], "--anchors"),
            "nms": _overlap(given["nms"]),
            "pad": _whole(numbers(given["pad"], "--pad"), "--pad", least=0),
        }
    )


def _overlap(text: str | None) -> float | None:
    if text is None or text.lower() == "none":
        return None if text is None else 0.0
    try:
        iou = float(text)
    except ValueError:
        iou = -1
    if not 0 < iou < 1:
        raise typer.BadParameter(f"--nms takes an overlap between 0 and 1, such as 0.45, or none, not {text!r}.")
    return iou


def _whole(values: tuple[float, ...] | None, flag: str, least: int) -> tuple[int, ...] | None:
    if values is not None and any(value != int(value) or value < least for value in values):
        raise typer.BadParameter(f"{flag} takes whole numbers of {least} or more.")
    return None if values is None else tuple(int(value) for value in values)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
