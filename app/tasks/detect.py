"""Object detection: rows of an engine to boxes, and masks, in pixels of the upright original."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.errors import InferenceError, InvalidValueError
from app.manifest import Detection, Entry
from app.masks import Box, Mask, decode_mask, paste
from app.resize import content_size, place
from app.tasks.base import Plan
from app.text import phrase_tokenizer

PLAN = Plan(("detect",))
WITH_MASKS = Plan(("detect",), heavy=True)


@dataclass(frozen=True)
class DetectOptions:
    """`threshold`: the lowest score that is given. `max_detections`: how many at most; None gives all.

    `classes`: names or ids of the only ones to give; empty for all. `masks`: whether to make the masks, too. `phrases`: what a
    model that knows no classes is to look for.
    """

    threshold: float = 0.5
    max_detections: int | None = None
    classes: tuple[str | int, ...] = ()
    masks: bool = False
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class DetectedObject:
    """One object; `box` xyxy in pixels of the upright original and inside of it, `score` in 0..1.

    Of a model that looks for phrases `label` is the phrase, as it was given, and `class_id` its first place among those given.
    """

    label: str
    class_id: int
    score: float
    box: Box
    mask: Mask | None = None


@dataclass(frozen=True)
class DetectResult:
    """What was found, the highest score first."""

    detections: tuple[DetectedObject, ...]


class Detect:
    """Detect objects: boxes in pixels of the image, with labels and scores."""

    name = "detect"
    role = "detect"

    def plan(self, options: DetectOptions) -> Plan:
        return WITH_MASKS if options.masks else PLAN

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: DetectOptions) -> Tensors:
        """The frame and, where the engine asks for it, how much of the frame the image fills, or the phrases to look for.

        Raises:
            InvalidValueError: a class that the model does not know, or masks of a model that has none; phrases where the model
                takes none, none where it needs them, too many, or one that it cannot read.
        """
        assert image is not None
        detection = detection_of(entry)
        if options.phrases and entry.manifest.text is None:
            raise InvalidValueError(f"{entry.manifest.model} has classes of its own and takes no phrases.", field="phrases")
        if not options.phrases and entry.manifest.text is not None:
            raise InvalidValueError(
                f"{entry.manifest.model} has no classes of its own; say in phrases what to look for.", field="phrases"
            )
        _wanted(options.classes, entry, _labels(entry, options))
        if options.masks and detection.masks is None:
            raise InvalidValueError(f"{entry.manifest.model} has no masks.", field="masks")
        if options.phrases:
            ids = phrase_tokenizer(entry).encode_together(_different(options.phrases), "phrases")
            return {"image": value[None], "input_ids": ids}
        if not detection.content:
            return {"image": value[None]}
        content = content_size(image.width, image.height, entry.manifest.preprocessing)
        return {"image": value[None], "content": np.array([content], np.int32)}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: DetectOptions) -> DetectResult:
        """Take `boxes` float32 [1,N,4], `scores` [1,N], `classes` int64 [1,N], and `masks` [1,N,C] where they are asked for.

        Rows whose box has no pixel of the image, such as those on the padding, are left out.

        Raises:
            InferenceError: the engine gave something that is not a number, or a class that the model does not have.
        """
        assert image is not None
        detection, rows = detection_of(entry), {name: tensor[0] for name, tensor in flow[-1].items()}
        if not all(np.isfinite(rows[name]).all() for name in rows):
            raise InferenceError(f"{entry} gave rows that are not numbers for this image.")
        scores, classes = rows["scores"], rows["classes"]
        labels = _labels(entry, options)
        known = len(labels) or detection.classes
        if classes.min() < 0 or classes.max() >= detection.classes or (classes[scores > 0] >= known).any():
            raise InferenceError(f"{entry} gave classes for this image that it does not have.")
        whole = in_original(rows["boxes"], entry, image)
        boxes = clip(whole, image)
        kept = (scores > 0) & (scores >= options.threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        if options.classes:
            kept &= np.isin(classes, _wanted(options.classes, entry, labels))
        best = np.flatnonzero(kept)
        best = best[np.argsort(-scores[best], kind="stable")][: options.max_detections]

        def detected(row: int) -> DetectedObject:
            number = int(classes[row])
            mask = None
            if options.masks and detection.masks is not None:
                drawn = decode_mask(rows["masks"][row], detection.masks.side)
                mask = paste(drawn, as_box(whole[row]), image.width, image.height)
            label = labels[number] if labels else str(number)
            place = options.phrases.index(label) if options.phrases else number
            return DetectedObject(label, place, float(scores[row]), as_box(boxes[row]), mask)

        return DetectResult(tuple(detected(row) for row in best.tolist()))


def detection_of(entry: Entry) -> Detection:
    """What a detector's rows mean."""
    assert entry.manifest.detection is not None  # or its manifest would not have been read
    return entry.manifest.detection


def in_original(boxes: NDArray[np.float32], entry: Entry, image: ImageInfo) -> NDArray[np.float64]:
    """Boxes xyxy [...,4] in shares of the engine's frame as pixels of the upright original, beyond its edges too."""
    preprocessing = entry.manifest.preprocessing
    frame = np.array([preprocessing.width, preprocessing.height] * 2, np.float64)
    return place(image.width, image.height, preprocessing).undo(boxes * frame)


def clip(boxes: NDArray[np.float64], image: ImageInfo) -> NDArray[np.float64]:
    """Boxes xyxy [...,4] in pixels, cut off at the edges of the image."""
    return np.clip(boxes, 0, np.array([image.width, image.height] * 2))


def as_box(row: NDArray[np.float64]) -> Box:
    """One box [4] as plain numbers."""
    left, top, right, bottom = row.tolist()
    return left, top, right, bottom


def _different(phrases: Sequence[str]) -> tuple[str, ...]:
    """Each once, where it comes first."""
    return tuple(dict.fromkeys(phrases))


def _labels(entry: Entry, options: DetectOptions) -> tuple[str, ...]:
    """The names of the engine's classes: its own, if it has any, or the phrases that it looks for."""
    return _different(options.phrases) or entry.manifest.labels


def _wanted(classes: Sequence[str | int], entry: Entry, names: Sequence[str]) -> list[int]:
    """The classes of the engine that are given by name (as in `names`; capitals do not matter) or by id."""
    labels = [label.casefold() for label in names]
    known = len(names) or detection_of(entry).classes
    wanted = []
    for given in classes:
        text = str(given).strip().casefold()
        found = [number for number, label in enumerate(labels) if label == text]
        if not found and text.isdecimal() and int(text) < known:
            found = [int(text)]
        if not found:
            raise InvalidValueError(f"{entry.manifest.model} has no class {str(given)[:100]!r}.", field="classes")
        wanted += found
    return wanted
