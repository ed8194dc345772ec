"""How well images and texts fit: the cosines of their vectors, and the probabilities that a dual encoder makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.manifest import Entry
from app.tasks.base import Plan
from app.tasks.classify import ClassifyResult, best_classes
from app.tasks.embed import IMAGES, embedding_of, probabilities, vector_of


@dataclass(frozen=True)
class SimilarityOptions:
    """`vectors`: of the texts, float32 [N,D] of unit length."""

    vectors: NDArray[np.float32]


@dataclass(frozen=True)
class SimilarityResult:
    """One image against every text, float32 [N] each, in the order of the texts."""

    similarities: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Similarity:
    """Compare images with texts: a row of similarities for each image."""

    name = "similarity"
    role = "image"

    def plan(self, options: SimilarityOptions) -> Plan:
        return IMAGES

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: SimilarityOptions) -> Tensors:
        return {"image": value[None]}

    def finish(
        self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: SimilarityOptions
    ) -> SimilarityResult:
        similarities = options.vectors @ vector_of(flow, entry)
        return SimilarityResult(similarities, probabilities(similarities, embedding_of(entry)))


@dataclass(frozen=True)
class ZeroShotOptions:
    """`vectors`: one for each of the `labels`, float32 [N,D] of unit length. `top_k`: as of `ClassifyOptions`."""

    labels: tuple[str, ...]
    vectors: NDArray[np.float32]
    top_k: int | None = None


class ZeroShot:
    """Classify images among labels that the request names."""

    name = "classify"
    role = "image"

    def plan(self, options: ZeroShotOptions) -> Plan:
        return IMAGES

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: ZeroShotOptions) -> Tensors:
        return {"image": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: ZeroShotOptions) -> ClassifyResult:
        """The `top_k` labels that fit best.

        Raises:
            InferenceError: the engine gave something that is not a number.
            InvalidValueError: `top_k` is not between 1 and the number of labels.
        """
        found = probabilities(options.vectors @ vector_of(flow, entry), embedding_of(entry))
        return best_classes(found, options.labels, options.top_k, "these labels")
