"""Image classification: probabilities to the best labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.errors import InferenceError, InvalidValueError
from app.manifest import Entry
from app.tasks.base import Plan

PLAN = Plan(("classify",))


@dataclass(frozen=True)
class ClassifyOptions:
    """`top_k`: how many classes to give; by default 5, or all when the model has fewer."""

    top_k: int | None = None


@dataclass(frozen=True)
class ClassScore:
    """One class; `score` is a probability in 0..1."""

    label: str
    class_id: int
    score: float


@dataclass(frozen=True)
class ClassifyResult:
    """The best classes, highest score first; equal scores in the order of their class id."""

    predictions: tuple[ClassScore, ...]


class Classify:
    """Classify images: the best labels with their probabilities."""

    name = "classify"
    role = "classify"

    def plan(self, options: ClassifyOptions) -> Plan:
        return PLAN

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: ClassifyOptions) -> Tensors:
        return {"image": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: ClassifyOptions) -> ClassifyResult:
        """Take `probabilities` float32 [1,C] and give the `top_k` best of them.

        Raises:
            InferenceError: the engine gave something that is not a number.
            InvalidValueError: `top_k` is not between 1 and the number of classes.
        """
        probabilities = flow[-1]["probabilities"][0]
        if not np.isfinite(probabilities).all():
            raise InferenceError(f"{entry} gave probabilities that are not numbers for this image.")
        return best_classes(probabilities, entry.manifest.labels, options.top_k, entry.manifest.model)


def best_classes(probabilities: NDArray[np.float32], labels: Sequence[str], top_k: int | None, whose: str) -> ClassifyResult:
    """The `top_k` highest of `probabilities` float32 [C]; by default 5, or all when there are fewer. Without `labels` by number.

    Raises:
        InvalidValueError: `top_k` is not between 1 and the number of classes of `whose`.
    """
    classes = len(probabilities)
    top_k = min(5, classes) if top_k is None else top_k
    if not 1 <= top_k <= classes:
        raise InvalidValueError(f"top_k must be between 1 and {classes} for {whose}.", field="top_k")
    best = _best(probabilities, top_k)
    scores = zip(best.tolist(), probabilities[best].tolist(), strict=True)
    return ClassifyResult(tuple(ClassScore(labels[i] if labels else str(i), i, score) for i, score in scores))


def _best(probabilities: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The indices of the `count` highest; sorts those alone, since a model may know thousands of classes."""
    last = np.partition(probabilities, -count)[-count]
    candidates = np.flatnonzero(probabilities >= last)
    return candidates[np.argsort(-probabilities[candidates], kind="stable")[:count]]
