"""The end of a user's own detector as nodes of its graph: outputs to boxes and scores, suppression, and the choice of rows.

Every operator means the same in the opsets 13 to 20, so that the graph keeps its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.detection_head import BINS, DetectionHead, Level, Output

_FLOAT = int(ir.DataType.FLOAT)
_INT64 = int(ir.DataType.INT64)


class Nodes:
    """Appends nodes to a graph, and gives what each computes: `nodes("Mul", value, 0.5)`. Numbers become constants of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.tape = ir.tape.Tape(graph)
        self.constants = 0

    def __call__(self, kind: str, *inputs: ir.Value | NDArray[Any] | float, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, [self._value(value) for value in inputs], attributes)

    def pair(self, kind: str, *inputs: ir.Value | NDArray[Any] | float, **attributes: Any) -> tuple[ir.Value, ir.Value]:
        """Of an operator with two outputs."""
        first, second = self.tape.op_multi_out(kind, [self._value(value) for value in inputs], attributes, num_outputs=2)
        return first, second

    def cut(self, value: ir.Value, start: int, end: int, axis: int = 2) -> ir.Value:
        return self("Slice", value, np.array([start]), np.array([end]), np.array([axis]))

    def _value(self, value: ir.Value | NDArray[Any] | float) -> ir.Value:
        if isinstance(value, ir.Value):
            return value
        array = np.float32(value) if isinstance(value, float) else value
        self.constants += 1
        return self.tape.initializer(ir.tensor(np.asarray(array), name=f"head/constant_{self.constants}"))


def append_head(graph: ir.Graph, outputs: Sequence[ir.Value], head: DetectionHead) -> None:
    """Make the outputs of `graph` boxes, scores, classes, query_scores, query_boxes and features, of its own `outputs`.

    `features` is what the head is computed of, all of it: what lies behind stays float32 in every precision.
    """
    nodes = Nodes(graph)
    for value, output in zip(outputs, head.outputs, strict=True):
        value.shape = ir.Shape(("batch", *output.shape))  # files that take any batch may still say that they give one row
    floats = [nodes("Cast", value, to=_FLOAT) if value.dtype != ir.DataType.FLOAT else value for value in outputs]
    features = floats[0] if len(floats) == 1 else nodes("Concat", *(_flat(nodes, value) for value in floats), axis=1)
    table = _table(nodes, features, head)
    query_boxes, query_scores = _decode(nodes, table, head)
    rows = _choose(nodes, query_boxes, query_scores, head)
    float_, int_ = ir.DataType.FLOAT, ir.DataType.INT64
    named = (
        ("boxes", rows[0], float_, (head.rows, 4)),
        ("scores", rows[1], float_, (head.rows,)),
        ("classes", rows[2], int_, (head.rows,)),
        ("query_scores", query_scores, float_, (head.queries, head.classes)),
        ("query_boxes", query_boxes, float_, (head.queries, 4)),
    )
    graph.outputs.clear()
    for name, value, dtype, shape in named:
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(("batch", *shape))
        graph.outputs.append(value)
    graph.outputs.append(features)


def _flat(nodes: Nodes, value: ir.Value) -> ir.Value:
    return nodes("Reshape", value, np.array([0, -1]))


def _table(nodes: Nodes, features: ir.Value, head: DetectionHead) -> ir.Value:
    """[B,queries,numbers] of the features: one output, or all of them laid end to end."""
    if len(head.outputs) == 1:
        return _as_rows(nodes, features, head.outputs[0], head)
    tables, start = [], 0
    for output in head.outputs:
        end = start + int(np.prod(output.shape))
        part = nodes("Reshape", nodes.cut(features, start, end, axis=1), np.array([0, *output.shape]))
        tables.append(_as_rows(nodes, part, output, head))
        start = end
    return nodes("Concat", *tables, axis=2 if head.beside else 1)


def _as_rows(nodes: Nodes, value: ir.Value, output: Output, head: DetectionHead) -> ir.Value:
    """One output as [B,A,K]."""
    if output.axes == "rows":
        return value
    if output.axes == "columns":
        return nodes("Transpose", value, perm=[0, 2, 1])
    if output.axes == "values":
        return nodes("Reshape", value, np.array([0, output.shape[0], 1]))
    if output.axes == "cells":
        return nodes("Reshape", value, np.array([0, int(np.prod(output.shape[:3])), output.shape[3]]))
    numbers, height, width = output.shape
    anchors = max(1, len(head.levels[head.outputs.index(output)].anchors))
    apart = nodes("Reshape", value, np.array([0, anchors, numbers // anchors, height * width]))
    return nodes(
        "Reshape", nodes("Transpose", apart, perm=[0, 1, 3, 2]), np.array([0, anchors * height * width, numbers // anchors])
    )


def _decode(nodes: Nodes, table: ir.Value, head: DetectionHead) -> tuple[ir.Value, ir.Value]:
    """[B,queries,numbers] -> boxes xyxy [B,queries,4] in shares of the frame, scores [B,queries,classes]."""
    raw, rest = _box_numbers(nodes, table, head)
    boxes = _corners(nodes, raw, head)
    if head.box_units == "pixels":
        height, width = head.frame
        boxes = nodes("Mul", boxes, np.array([1 / width, 1 / height] * 2, np.float32))
    return boxes, _final_scores(nodes, rest, head) if head.coding == "final" else _scores(nodes, rest, head)


def _box_numbers(nodes: Nodes, table: ir.Value, head: DetectionHead) -> tuple[ir.Value, ir.Value]:
    """Boxes in the format and units of the head [B,A,4], and the other numbers [B,A,K]."""
    end = 4 * BINS if head.coding == "dfl" else 4
    box, rest = nodes.cut(table, 0, end), nodes.cut(table, end, np.iinfo(np.int32).max)
    if head.coding in ("plain", "final"):
        return box, rest
    corner, stride, anchor = _cells(head.levels)
    if head.coding == "dfl":
        bins = nodes("Reshape", box, np.array([0, head.queries, 4, BINS]))
        cells = nodes("MatMul", nodes("Softmax", bins, axis=-1), np.arange(BINS, dtype=np.float32)[:, None])
        distances = nodes("Reshape", cells, np.array([0, head.queries, 4]))
        signs = np.array([-1, -1, 1, 1], np.float32)
        return nodes("Mul", nodes("Add", nodes("Mul", distances, signs), np.tile(corner, 2) + np.float32(0.5)), stride), rest
    place, size = nodes.cut(box, 0, 2), nodes.cut(box, 2, 4)
    if head.coding == "grid":
        place, size = nodes("Add", place, corner), nodes("Mul", nodes("Exp", size), stride)
    elif head.coding == "anchors":
        place = nodes("Add", nodes("Mul", nodes("Sigmoid", place), 2.0), corner - np.float32(0.5))
        twice = nodes("Mul", nodes("Sigmoid", size), 2.0)
        size = nodes("Mul", nodes("Mul", twice, twice), anchor)
    else:
        place, size = nodes("Add", nodes("Sigmoid", place), corner), nodes("Mul", nodes("Exp", size), anchor)
    return nodes("Concat", nodes("Mul", place, stride), size, axis=2), rest


def _cells(levels: Sequence[Level]) -> tuple[NDArray[np.float32], ...]:
    """Of every query: its cell's column and row [1,A,2], its stride [1,A,1] and its anchor's width and height [1,A,2]."""
    corners, strides, anchors = [], [], []
    for level in levels:
        rows, columns = np.mgrid[0 : level.height, 0 : level.width]
        cell = np.stack([columns.ravel(), rows.ravel()], axis=1)
        for anchor in level.anchors or ((0.0, 0.0),):
            corners.append(cell)
            strides.append(np.full((len(cell), 1), level.stride))
            anchors.append(np.tile(anchor, (len(cell), 1)))
    return tuple(np.concatenate(parts)[None].astype(np.float32) for parts in (corners, strides, anchors))


def _corners(nodes: Nodes, boxes: ir.Value, head: DetectionHead) -> ir.Value:
    """Boxes of any format as xyxy, in their units."""
    if head.box_format == "xyxy":
        return boxes
    place, size = nodes.cut(boxes, 0, 2), nodes.cut(boxes, 2, 4)
    first = nodes("Sub", place, nodes("Mul", size, 0.5)) if head.box_format == "cxcywh" else place
    return nodes("Concat", first, nodes("Add", first, size), axis=2)


def _scores(nodes: Nodes, rest: ir.Value, head: DetectionHead) -> ir.Value:
    start = int(head.objectness)
    scores = nodes.cut(rest, start, start + head.classes + (head.background != "none"))
    if head.logits:
        scores = nodes("Softmax", scores, axis=-1) if head.activation == "softmax" else nodes("Sigmoid", scores)
    if head.background != "none":
        first = int(head.background == "first")
        scores = nodes.cut(scores, first, first + head.classes)
    if head.objectness:
        objectness = nodes.cut(rest, 0, 1)
        scores = nodes("Mul", scores, nodes("Sigmoid", objectness) if head.logits else objectness)
    return scores


def _final_scores(nodes: Nodes, rest: ir.Value, head: DetectionHead) -> ir.Value:
    """A score and the number of a class as scores of all classes, of which one is not 0."""
    score, found = nodes.cut(rest, 0, 1), nodes("Cast", nodes.cut(rest, 1, 2), to=_INT64)
    if head.logits:
        score = nodes("Sigmoid", score)
    return nodes("Mul", score, nodes("Cast", nodes("Equal", found, np.arange(head.classes)), to=_FLOAT))


def _choose(nodes: Nodes, boxes: ir.Value, scores: ir.Value, head: DetectionHead) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The best rows: boxes [B,rows,4], scores [B,rows], classes int64 [B,rows]. What was suppressed has the score 0."""
    if head.multi_label:
        pairs = nodes("Transpose", scores, perm=[0, 2, 1])
        if head.nms:
            found = _survivors(nodes, boxes, pairs, head)
            pairs = nodes("Mul", pairs, _mark(nodes, found, like=pairs))
        best, index = nodes.pair("TopK", _flat(nodes, pairs), np.array([head.rows]), axis=1)
        classes = nodes("Div", index, np.array(head.queries))
        return _rows(nodes, boxes, nodes("Mod", index, np.array(head.queries)), head), best, classes
    likeliest = nodes("ArgMax", scores, axis=2, keepdims=1)
    single = nodes("GatherElements", scores, likeliest, axis=2)
    values = _flat(nodes, single)
    if head.nms:
        candidates = nodes("Transpose", single, perm=[0, 2, 1])
        if not head.agnostic:
            by_class = nodes("Expand", 0.0, nodes("Gather", nodes("Shape", scores), np.array([0, 2, 1])))
            candidates = nodes("ScatterElements", by_class, nodes("Transpose", likeliest, perm=[0, 2, 1]), candidates, axis=1)
        found = _survivors(nodes, boxes, candidates, head)
        image_and_query = nodes("Gather", found, np.array([0, 2]), axis=1)
        values = nodes("Mul", values, _mark(nodes, image_and_query, like=values))
    best, index = nodes.pair("TopK", values, np.array([head.rows]), axis=1)
    return _rows(nodes, boxes, index, head), best, nodes("GatherElements", _flat(nodes, likeliest), index, axis=1)


def _survivors(nodes: Nodes, boxes: ir.Value, candidates: ir.Value, head: DetectionHead) -> ir.Value:
    """The candidates [B,classes,A] that no better one of their class suppresses: int64 [n,3], image, class and query.

    No class needs more of them than there are rows.
    """
    overlap, least = np.array([head.nms], np.float32), np.array([head.score_threshold], np.float32)
    return nodes("NonMaxSuppression", boxes, candidates, np.array([head.rows]), overlap, least)


def _mark(nodes: Nodes, places: ir.Value, like: ir.Value) -> ir.Value:
    """1 at the `places` [n,axes], else 0, in the shape of `like`."""
    ones = nodes("Expand", 1.0, nodes("Shape", nodes("Gather", places, np.array(0), axis=1)))
    return nodes("ScatterND", nodes("Expand", 0.0, nodes("Shape", like)), places, ones)


def _rows(nodes: Nodes, boxes: ir.Value, index: ir.Value, head: DetectionHead) -> ir.Value:
    """[B,A,4] at [B,rows] -> [B,rows,4]."""
    wide = nodes("Expand", nodes("Reshape", index, np.array([0, head.rows, 1])), np.array([1, 1, 4]))
    return nodes("GatherElements", boxes, wide, axis=1)
