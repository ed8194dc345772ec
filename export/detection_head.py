"""What the outputs of a user's own detector mean, in full: its family's conventions, the flags, and the shapes that were found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from export.detect_options import Anchor, Background, BoxFormat, BoxUnits, DetectOptions, HeadName
from export.spec import Activation, ExportError, OnnxInterface

T = TypeVar("T")
Coding = Literal["plain", "grid", "anchors", "exp-anchors", "dfl", "final"]
"""How a query's first numbers make a box.

`plain`: they are one. `grid`: the offset from the cell's corner and the logarithm of the size, in cells (YOLOX).
`anchors`: sigmoids of the offset and of the size's share of an anchor (YOLOv5). `exp-anchors`: the sigmoid of the offset and the
logarithm of that share (YOLOv3). `dfl`: distributions of the distances of the four sides from the cell's centre, in cells (YOLOv8).
`final`: a box that the network itself has chosen, then its score and its class.
"""
Shapes = Mapping[str, tuple[int, ...]]
"""The outputs of a network by name, for one image: (1, ...) each."""

BINS = 16  # of a distribution of distances: `reg_max` of YOLOv8
_MAPPED = ("grid", "anchors", "exp-anchors", "dfl")
_ANCHORED = ("anchors", "exp-anchors")


@dataclass(frozen=True)
class Family:
    """How the detectors of one kind are usually exported and trained. None: there is no convention, a flag must say it.

    `plain_pixels`: they are scaled and nothing else, so that neither mean nor deviation need be given.
    """

    coding: Coding = "plain"
    objectness: bool = False
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    scores: Literal["logits", "probabilities"] | None = None
    activation: Activation = "sigmoid"
    background: Background = "none"
    multi_label: bool = False
    nms: float = 0.0
    fit: Anchor | Literal["stretch"] | None = "centre"
    colour: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    plain_pixels: bool = True


FAMILIES: dict[HeadName, Family] = {
    "yolov8": Family("plain", False, "cxcywh", "pixels", "probabilities", nms=0.7),
    "yolov8-raw": Family("dfl", False, "xyxy", "pixels", "logits", nms=0.7),
    "yolov5": Family("plain", True, "cxcywh", "pixels", "probabilities", nms=0.45),
    "yolov5-raw": Family("anchors", True, "cxcywh", "pixels", "logits", nms=0.45),
    "yolov3-raw": Family("exp-anchors", True, "cxcywh", "pixels", "logits", nms=0.45),
    "yolox": Family("grid", True, "cxcywh", "pixels", "probabilities", nms=0.45, fit="corner", colour="BGR", scale=1.0),
    "detr": Family("plain", False, "cxcywh", "shares", "logits", "softmax", "last", fit=None, plain_pixels=False),
    "rt-detr": Family("plain", False, "cxcywh", "shares", "logits", multi_label=True, fit="stretch"),
    "end2end": Family("final", False, "xyxy", "pixels", "probabilities"),
    "boxes": Family(fit=None, plain_pixels=False),
}
_GRID_STRIDES = (8, 16, 32)  # of levels that come as one table, whose shape does not say them


@dataclass(frozen=True)
class Output:
    """One output of the network, [B,*shape]: `rows` [A,K], `columns` [K,A], `values` [A], `map` [n*K,H,W] or `cells` [n,H,W,K]."""

    name: str
    shape: tuple[int, ...]
    axes: Literal["rows", "columns", "values", "map", "cells"]

    def __str__(self) -> str:
        return f"{self.name} {[1, *self.shape]}"


@dataclass(frozen=True)
class Level:
    """One grid of cells: height and width, pixels of the frame a cell, and the anchors of each (width, height in pixels)."""

    height: int
    width: int
    stride: int
    anchors: tuple[tuple[float, float], ...] = ()

    @property
    def queries(self) -> int:
        return self.height * self.width * max(1, len(self.anchors))


@dataclass(frozen=True)
class DetectionHead:
    """All that decoding needs.

    `outputs` are parts of one table that lie `beside` one another, or levels, one each. The numbers of a query: its box, its
    objectness if it has any, and its scores, `background` included; of `final` four corners, a score and a class. `levels`, where
    boxes are relative to cells, in the order of the queries. `logits`: objectness and scores are not in 0..1 yet. `nms` 0: nothing
    is suppressed. `multi_label`: a row is a pair of query and class, not a query with its likeliest class. `rows` are given.
    """

    outputs: tuple[Output, ...]
    beside: bool
    coding: Coding
    frame: tuple[int, int]  # height, width
    queries: int
    classes: int
    objectness: bool
    box_format: BoxFormat
    box_units: BoxUnits
    logits: bool
    activation: Activation
    background: Background
    levels: tuple[Level, ...]
    nms: float
    agnostic: bool
    multi_label: bool
    score_threshold: float
    rows: int


def family_of(options: DetectOptions, shapes: Mapping[str, tuple[Any, ...]]) -> Family:
    """The conventions of `--head`.

    Raises:
        ExportError: it is left out; says what the model gives.
    """
    if options.head is None:
        raise ExportError(f"Say with --head what the model's outputs are ({', '.join(FAMILIES)}); it gives {_tell(shapes)}.")
    return FAMILIES[options.head]


def resolve_head(
    options: DetectOptions,
    interface: OnnxInterface,
    shapes: Shapes,
    frame: tuple[int, int],
    *,
    activation: Activation | None = None,
    num_classes: int | None = None,
) -> DetectionHead:
    """Lay the flags over the family's conventions and hold them against the shapes. `num_classes` does not count the background.

    Raises:
        ExportError: flags that do not go together, or not with the shapes; says what was found.
    """
    family = family_of(options, shapes)
    _check_flags(options, family)
    background = options.background or family.background
    others = {
        "box": 4 * BINS if family.coding == "dfl" else 4,
        "objectness": int(family.objectness),
        "background": background != "none",
    }
    wanted = None if num_classes is None else num_classes + sum(others.values())
    if family.coding == "final":
        wanted = 6
    outputs, beside = _find_outputs(options, interface, family, shapes, wanted)
    levels, channels = _read_levels(options, family, outputs, frame)
    if family.coding == "final":
        classes = _classes_told(num_classes, outputs)
    else:
        classes = _count_classes(outputs, channels, others, num_classes)
    queries = sum(level.queries for level in levels) if levels else _count_queries(outputs[0])
    multi_label = family.multi_label if options.multi_label is None else options.multi_label
    return DetectionHead(
        outputs=outputs,
        beside=beside,
        coding=family.coding,
        frame=frame,
        queries=queries,
        classes=classes,
        objectness=family.objectness,
        box_format=_said(options.box_format or family.box_format, "--box-format"),
        box_units=_said(options.box_units or family.box_units, "--box-units"),
        logits=_said(interface.output or family.scores, "--output") == "logits",
        activation=activation or family.activation,
        background=background,
        levels=levels,
        nms=family.nms if options.nms is None else options.nms,
        agnostic=options.agnostic_nms,
        multi_label=multi_label,
        score_threshold=options.score_threshold,
        rows=min(options.max_detections, queries * classes if multi_label else queries),
    )


def _check_flags(options: DetectOptions, family: Family) -> None:
    """Flags that say what the head has no use for."""
    own = [flag for flag, given in (("--box-format", options.box_format), ("--box-units", options.box_units)) if given is not None]
    if own and family.coding in _MAPPED:
        raise ExportError(f"The boxes of {options.head} are decoded here, so leave {' and '.join(own)} out.")
    if options.strides is not None and family.coding not in _MAPPED:
        raise ExportError(f"The boxes of {options.head} are relative to no grid, so leave --strides out.")
    if (options.anchors is not None) != (family.coding in _ANCHORED):
        needs = "needs" if options.anchors is None else "has no use for"
        raise ExportError(f"The head {options.head} {needs} --anchors (W,H,W,H,... in pixels, the finest level first).")
    multi_label = family.multi_label if options.multi_label is None else options.multi_label
    if options.agnostic_nms and multi_label:
        raise ExportError("Of equal boxes agnostic suppression keeps one, so leave --agnostic-nms or --multi-label out.")
    if options.agnostic_nms and not (family.nms if options.nms is None else options.nms):
        raise ExportError("Boxes are not suppressed, so leave --agnostic-nms out, or give --nms IOU.")


def _find_outputs(
    options: DetectOptions, interface: OnnxInterface, family: Family, shapes: Shapes, wanted: int | None
) -> tuple[tuple[Output, ...], bool]:
    """The outputs that count, and whether they are parts of one table; else they are levels, or the one table."""
    parts = {"--boxes-name": options.boxes_name, "--scores-name": options.scores_name, "--classes-name": options.classes_name}
    if any(parts.values()):
        return _find_parts({flag: name for flag, name in parts.items() if name}, family, shapes), True
    named = [] if interface.output_name is None else interface.output_name.split(",")
    _check_names(named, shapes)
    chosen = {name: shapes[name] for name in named or shapes}
    if family.coding in _MAPPED:
        maps = {name: shape for name, shape in chosen.items() if len(shape) in (4, 5)}
        if len(maps) == len(chosen) or (maps and family.coding != "grid"):
            return tuple(Output(name, shape[1:], "map" if len(shape) == 4 else "cells") for name, shape in maps.items()), False
    tables = {name: shape for name, shape in chosen.items() if len(shape) == 3}
    apart = _apart(tables, family)
    if apart is not None:
        return _find_parts(apart, family, shapes), True
    if len(tables) != 1 or family.coding in ("anchors", "exp-anchors", "dfl"):
        kind = (
            "map a level, [1,...,height,width]" if family.coding in ("anchors", "exp-anchors", "dfl") else "table [1,boxes,numbers]"
        )
        raise ExportError(
            f"The head {options.head} wants a {kind}, and the model gives {_tell(shapes)}; name what counts with --output-name, "
            "or with --boxes-name and --scores-name."
        )
    ((name, shape),) = tables.items()
    return (_table(name, shape, wanted),), False


def _apart(tables: Shapes, family: Family) -> dict[str, str] | None:
    """Boxes and scores by the flags that would name them, where the shapes alone say which is which."""
    boxes = [name for name, shape in tables.items() if shape[2] == 4]
    others = [name for name, shape in tables.items() if shape[2] != 4]
    if family.coding != "plain" or family.objectness or len(boxes) != 1 or len(others) != 1:
        return None
    (box,), (score,) = boxes, others
    return {"--boxes-name": box, "--scores-name": score} if tables[box][1] == tables[score][1] else None


def _find_parts(named: Mapping[str, str], family: Family, shapes: Shapes) -> tuple[Output, ...]:
    """Boxes, scores and, of `final`, classes: one table in parts."""
    flags = ["--boxes-name", "--scores-name", *(["--classes-name"] if family.coding == "final" else [])]
    if list(named) != flags or family.coding in _MAPPED:
        raise ExportError(
            f"Outputs that come apart are named with {' and '.join(flags)}, all of them, and their boxes are boxes already."
        )
    _check_names(list(named.values()), shapes)
    boxes, *others = (shapes[name] for name in named.values())
    count = next((boxes[3 - axis] for axis in (2, 1) if len(boxes) == 3 and boxes[axis] == 4), None)
    fitting = [shape for shape in others if len(shape) == (2 if family.coding == "final" else 3) and count in shape[1:]]
    if count is None or len(fitting) != len(others):
        found = _tell({name: shapes[name] for name in named.values()})
        form = "[1,boxes] each" if family.coding == "final" else "[1,boxes,classes]"
        raise ExportError(f"Boxes are [1,boxes,4] and what belongs to them is {form}; the model gives {found}.")
    axes = {name: _part_axes(shapes[name], count) for name in named.values()}
    return tuple(Output(name, shapes[name][1:], axes[name]) for name in named.values())


def _part_axes(shape: tuple[int, ...], count: int) -> Literal["rows", "columns", "values"]:
    if len(shape) == 2:
        return "values"
    return "rows" if shape[1] == count else "columns"


def _table(name: str, shape: tuple[int, ...], wanted: int | None) -> Output:
    """The numbers of a query lie along the axis that has as many as are wanted; where none are told, along the shorter one."""
    _, first, second = shape
    fitting = [axis for axis, size in ((2, second), (1, first)) if size == wanted]
    if wanted is not None and not fitting:
        raise ExportError(f"{name} [1, {first}, {second}] has no axis of {wanted} numbers a box, as --head and the classes want.")
    if wanted is None and first == second:
        raise ExportError(f"{name} [1, {first}, {second}] does not say which axis is of boxes; give --num-classes.")
    rows = fitting[0] == 2 if fitting else second < first
    return Output(name, shape[1:], "rows" if rows else "columns")


def _read_levels(
    options: DetectOptions, family: Family, outputs: tuple[Output, ...], frame: tuple[int, int]
) -> tuple[tuple[Level, ...], int]:
    """The grids, in the order of the queries, and how many numbers a query has."""
    if family.coding not in _MAPPED:
        return (), sum(1 if part.axes == "values" else part.shape[1 if part.axes == "rows" else 0] for part in outputs)
    if outputs[0].axes in ("rows", "columns"):
        return _levels_of_table(options.strides or _GRID_STRIDES, outputs[0], frame)
    sizes = [output.shape[1:3] for output in outputs]
    strides = tuple(frame[0] // height for height, _ in sizes)
    for output, (height, width), stride in zip(outputs, sizes, strides, strict=True):
        if (height * stride, width * stride) != frame:
            raise ExportError(f"{output} is no grid of whole strides over a frame of {frame[0]}x{frame[1]}.")
    if options.strides is not None and sorted(options.strides) != sorted(strides):
        found = ", ".join(f"{output} has a stride of {stride}" for output, stride in zip(outputs, strides, strict=True))
        raise ExportError(f"--strides {','.join(map(str, options.strides))} does not fit: {found}.")
    return _anchored(options.anchors or (), outputs, strides)


def _levels_of_table(strides: Sequence[int], table: Output, frame: tuple[int, int]) -> tuple[tuple[Level, ...], int]:
    levels = tuple(Level(frame[0] // stride, frame[1] // stride, stride) for stride in strides)
    cells, queries = sum(level.queries for level in levels), _count_queries(table)
    if cells != queries or any(side % stride for side in frame for stride in strides):
        told = ",".join(map(str, strides))
        raise ExportError(f"Strides of {told} make {cells} cells of a frame of {frame[0]}x{frame[1]}, but {table} has {queries}.")
    return levels, table.shape[1 if table.axes == "rows" else 0]


def _anchored(flat: Sequence[float], outputs: tuple[Output, ...], strides: Sequence[int]) -> tuple[tuple[Level, ...], int]:
    """Levels with their share of the anchors, which are told from the finest level on."""
    pairs = [(flat[index], flat[index + 1]) for index in range(0, len(flat) - 1, 2)]
    each, rest = divmod(len(pairs), len(outputs))
    if len(flat) % 2 or rest or min(flat, default=1) <= 0:
        raise ExportError(f"--anchors takes as many pairs of sides for each of {len(outputs)} levels, not {len(flat)} numbers.")
    finest_first = sorted(strides)
    levels, channels = [], set()
    for output, stride in zip(outputs, strides, strict=True):
        place = finest_first.index(stride) * each
        levels.append(Level(output.shape[1], output.shape[2], stride, tuple(pairs[place : place + each])))
        numbers, odd = (
            (output.shape[3], output.shape[0] != max(1, each)) if output.axes == "cells" else divmod(output.shape[0], max(1, each))
        )
        channels.add(0 if odd else numbers)
    if len(channels) != 1 or 0 in channels:
        found = ", ".join(map(str, outputs))
        raise ExportError(f"With {max(1, each)} anchors a cell every level has as many numbers for each; the model gives {found}.")
    return tuple(levels), channels.pop()


def _count_classes(outputs: tuple[Output, ...], channels: int, others: Mapping[str, int], told: int | None) -> int:
    classes = channels - sum(others.values())
    if classes < 1 or told not in (None, classes):
        parts = " and ".join(f"{count} of {what}" for what, count in others.items() if count)
        raise ExportError(
            f"{', '.join(map(str, outputs))} has {channels} numbers a box: {parts} leave {classes} for classes"
            f"{'' if told is None else f', not {told}'}. Is the head another? (Masks and keypoints are not served.)"
        )
    return classes


def _classes_told(told: int | None, outputs: tuple[Output, ...]) -> int:
    if told is None:
        raise ExportError(
            f"{', '.join(map(str, outputs))} does not say how many classes there are; give --labels or --num-classes."
        )
    return told


def _count_queries(table: Output) -> int:
    return table.shape[1] if table.axes == "columns" else table.shape[0]


def _check_names(names: Sequence[str], shapes: Shapes) -> None:
    for name in names:
        if name not in shapes:
            raise ExportError(f"The model has no output {name!r}; it gives {_tell(shapes)}.")


def _said(value: T | None, flag: str) -> T:
    if value is None:
        raise ExportError(f"Nothing says what the model's boxes and scores are; give {flag} (or a --head that has it).")
    return value


def _tell(shapes: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
