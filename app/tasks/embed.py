"""Vectors of images and of texts in one space, as the two engines of a dual encoder give them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.errors import InferenceError
from app.manifest import Embedding, Entry
from app.tasks.base import Plan

IMAGES = Plan(("image",))
TEXTS = Plan(("text",))

Vector = NDArray[np.float32]
"""float32 [D] of unit length."""


@dataclass(frozen=True)
class EmbedResult:
    """The vector of an image, or of a text: then `tokens` is how many ids it made, and `truncated` whether its end was cut off."""

    vector: Vector
    tokens: int | None = None
    truncated: bool = False


class Embed:
    """Embed images and texts: vectors of unit length whose product says how well they fit."""

    name = "embed"
    role = "image"

    def plan(self, options: None) -> Plan:
        return IMAGES

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: None) -> Tensors:
        return {"image": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: None) -> EmbedResult:
        return EmbedResult(vector_of(flow, entry))


class EmbedText:
    """Embed texts, each given as the ids int64 [L] that its tokenizer made."""

    name = "embed"
    role = "text"

    def plan(self, options: None) -> Plan:
        return TEXTS

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: None) -> Tensors:
        return {"input_ids": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: None) -> Vector:
        return vector_of(flow, entry)


def vector_of(flow: Sequence[Tensors], entry: Entry) -> Vector:
    """Take `embedding` float32 [1,D] of what became of one item.

    Raises:
        InferenceError: the engine gave something that is not a number.
    """
    vector: Vector = flow[-1]["embedding"][0]
    if not np.isfinite(vector).all():
        raise InferenceError(f"{entry} gave a vector that is not of numbers.")
    return np.array(vector)  # rows of a batch would keep all of it in memory


def embedding_of(entry: Entry) -> Embedding:
    """What the vectors of a dual encoder's engine mean."""
    assert entry.manifest.embedding is not None  # or its manifest would not have been read
    return entry.manifest.embedding


def probabilities(similarities: NDArray[np.float32], embedding: Embedding) -> NDArray[np.float32]:
    """Cosines of an image and texts [N] -> how probable each text is, float32 [N]: among them all, or each for itself."""
    logits = embedding.scale * similarities.astype(np.float64) + embedding.bias
    if embedding.activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(logits / 2)), np.float32)
    exponents = np.exp(logits - logits.max())
    shares: NDArray[np.float32] = (exponents / exponents.sum()).astype(np.float32)
    return shares
