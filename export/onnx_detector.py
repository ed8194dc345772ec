"""A user's own ONNX detector as a `Detector`: onnxruntime runs it, and torch decodes what it gives, a level and an image at a time.

It is what an engine is held against, so nothing of it is shared with the nodes of `export/detection_graph.py`.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from export.detection_head import BINS, DetectionHead, Level
from export.detector import Detections, Detector, Queries
from export.onnx_network import OnnxNetwork


class OnnxDetector(Detector):
    """`network` with the outputs that `head` names. Its logits are scores already, of the classes alone."""

    content = False

    def __init__(self, network: OnnxNetwork, head: DetectionHead) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.rows = head.rows
        self.score = "sigmoid" if head.multi_label else "softmax"

    def encode(self, images: Tensor, content: Tensor | None) -> Tensor:
        """Normalised float32 [B,3,H,W] -> all outputs of the network, flat and end to end, float64 [B,N]."""
        return torch.cat([torch.from_numpy(raw).flatten(1).double() for raw in self.network.run_all(images.numpy())], dim=1)

    def decode(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> Queries:
        """Scores [B,queries,classes] in place of logits, boxes xyxy in shares of the frame."""
        parts = [self._parts(image) for image in features]
        boxes = torch.stack([self._in_shares(box) for box, _ in parts])
        return Queries(torch.stack([self._scores_of(rest) for _, rest in parts]).float(), boxes.float())

    def raw_scores(self, features: Tensor) -> Tensor:
        """[B,queries,numbers]: objectness and scores as the network gives them."""
        rest = torch.stack([self._parts(image)[1] for image in features])
        return rest[..., :1] if self.head.coding == "final" else rest

    def scores(self, logits: Tensor) -> Tensor:
        return logits

    def choose(self, queries: Queries, scores: Tensor) -> Detections:
        """The best rows of each image, filled up by zeros."""
        boxes = torch.zeros(len(scores), self.rows, 4)
        best, classes = torch.zeros(len(scores), self.rows), torch.zeros(len(scores), self.rows, dtype=torch.int64)
        for image, (all_boxes, all_scores) in enumerate(zip(queries.boxes, scores, strict=True)):
            query, found = self._candidates(all_scores)
            kept = self._suppress(all_boxes[query].double(), all_scores[query, found].double(), found)
            count = len(kept)
            boxes[image, :count], classes[image, :count] = all_boxes[query[kept]], found[kept]
            best[image, :count] = all_scores[query[kept], found[kept]]
        return Detections(boxes, best, classes)

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and classes [n] that may become rows, of scores [queries,classes]."""
        least = self.head.score_threshold if self.head.nms else 0.0
        if self.head.multi_label:
            query, found = torch.where(scores > least)
            return query, found
        best, likeliest = scores.max(dim=1)
        (query,) = torch.where(best > least)
        return query, likeliest[query]

    def _suppress(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        """The candidates that stay, the best first, no more than there are rows."""
        if not self.head.nms:
            return scores.argsort(descending=True, stable=True)[: self.rows]
        groups = torch.zeros_like(classes) if self.head.agnostic else classes
        kept: Tensor = batched_nms(boxes, scores, groups, self.head.nms)
        return kept[: self.rows]

    def _parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of one image [N]: boxes [queries,4] in the head's format and units, and the other numbers [queries,...]."""
        head = self.head
        parts = torch.split(features, [math.prod(output.shape) for output in head.outputs])
        tables = [_table(part.view(output.shape), output.axes) for part, output in zip(parts, head.outputs, strict=True)]
        if not head.levels:
            table = torch.cat(tables, dim=1)
            return table[:, :4], table[:, 4:]
        if head.outputs[0].axes in ("rows", "columns"):
            cells = torch.split(tables[0], [level.queries for level in head.levels])
            tables = [part.T.reshape(-1, level.height, level.width) for part, level in zip(cells, head.levels, strict=True)]
        decoded = [self._decode_level(maps, level) for maps, level in zip(tables, head.levels, strict=True)]
        boxes, rest = zip(*decoded, strict=True)
        return torch.cat(boxes), torch.cat(rest)

    def _in_shares(self, boxes: Tensor) -> Tensor:
        """[queries,4] -> xyxy in shares of the frame."""
        corners: Tensor = box_convert(boxes, self.head.box_format, "xyxy")
        height, width = self.head.frame
        return corners / torch.tensor([width, height, width, height]) if self.head.box_units == "pixels" else corners

    def _decode_level(self, maps: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """[n*K,H,W] -> boxes [n*H*W,4] as the head has them, the other numbers [n*H*W,...]."""
        y, x = torch.meshgrid(torch.arange(level.height), torch.arange(level.width), indexing="ij")
        boxes, others = [], []
        for index, block in enumerate(maps.chunk(max(1, len(level.anchors)))):
            if self.head.coding == "dfl":
                bins = block[: 4 * BINS].reshape(4, BINS, level.height, level.width).softmax(1)
                left, top, right, bottom = (bins * torch.arange(BINS).view(1, -1, 1, 1)).sum(1)
                sides = [x + 0.5 - left, y + 0.5 - top, x + 0.5 + right, y + 0.5 + bottom]
                box = torch.stack(sides) * level.stride
                rest = block[4 * BINS :]
            else:
                box, rest = self._decode_anchor(block[:4], x, y, level, index), block[4:]
            boxes.append(box.flatten(1).T)
            others.append(rest.flatten(1).T)
        return torch.cat(boxes), torch.cat(others)

    def _decode_anchor(self, box: Tensor, x: Tensor, y: Tensor, level: Level, index: int) -> Tensor:
        """Four maps [4,H,W] -> centre and size in pixels of the frame, as the family's own code has it."""
        if self.head.coding == "grid":
            size = box[2:].exp() * level.stride
            return torch.cat([torch.stack([box[0] + x, box[1] + y]) * level.stride, size])
        width, height = level.anchors[index]
        anchor = torch.tensor([width, height]).view(2, 1, 1)
        places = box[:2].sigmoid()
        if self.head.coding == "anchors":
            centre = torch.stack([places[0] * 2 - 0.5 + x, places[1] * 2 - 0.5 + y])
            return torch.cat([centre * level.stride, (box[2:].sigmoid() * 2) ** 2 * anchor])
        return torch.cat([torch.stack([places[0] + x, places[1] + y]) * level.stride, box[2:].exp() * anchor])

    def _scores_of(self, rest: Tensor) -> Tensor:
        """Objectness and scores, or a score and a class, as scores of the classes."""
        head = self.head
        if head.coding == "final":
            scores = torch.zeros(len(rest), head.classes, dtype=rest.dtype)
            score, found = (rest[:, 0].sigmoid() if head.logits else rest[:, 0]), rest[:, 1].long()
            known = (found >= 0) & (found < head.classes)
            scores[known.nonzero()[:, 0], found[known]] = score[known]
            return scores
        objectness, scores = rest[:, : int(head.objectness)], rest[:, int(head.objectness) :]
        if head.logits:
            objectness, scores = objectness.sigmoid(), scores.softmax(1) if head.activation == "softmax" else scores.sigmoid()
        scores = {"none": scores, "first": scores[:, 1:], "last": scores[:, :-1]}[head.background]
        return scores * objectness if head.objectness else scores


def _table(output: Tensor, axes: str) -> Tensor:
    """One output of one image: [A,K], or of a level [n*K,H,W]."""
    if axes == "columns":
        return output.T
    if axes == "values":
        return output[:, None]
    return output.permute(0, 3, 1, 2).flatten(0, 1) if axes == "cells" else output
