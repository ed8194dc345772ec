"""Visual grounding: phrases to the boxes that they speak of, in pixels of the upright original."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.errors import InferenceError
from app.manifest import Entry
from app.masks import Box
from app.resize import content_size
from app.tasks.base import Plan
from app.tasks.detect import as_box, clip, in_original
from app.text import phrase_tokenizer

PLAN = Plan(("ground",))


@dataclass(frozen=True)
class GroundOptions:
    """`phrases`: what to look for in every image, one or more."""

    phrases: tuple[str, ...]


@dataclass(frozen=True)
class GroundedPhrase:
    """Where a phrase leads; `box` xyxy in pixels of the upright original and inside of it (without area where it leads outside),
    None where a chat model has named none.

    `score` in 0..1, None of a model that has none. `truncated`: the phrase was too long, and its last words were not read.
    """

    phrase: str
    box: Box | None
    score: float | None
    truncated: bool


@dataclass(frozen=True)
class GroundResult:
    """One answer to each phrase, in their order."""

    groundings: tuple[GroundedPhrase, ...]


class Ground:
    """Ground phrases: the box in the image that each phrase speaks of."""

    name = "ground"
    role = "ground"

    def plan(self, options: GroundOptions) -> Plan:
        return PLAN

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: GroundOptions) -> Tensors:
        """One row for each phrase, all with the same frame.

        Raises:
            InvalidValueError: a phrase that the model cannot read; the field is `phrase`.
        """
        assert image is not None
        tokenizer = phrase_tokenizer(entry)
        encoded = [tokenizer.encode(phrase) for phrase in options.phrases]
        tensors: dict[str, NDArray[Any]] = {
            "image": np.repeat(value[None], len(encoded), axis=0),
            "input_ids": np.stack([phrase.input_ids for phrase in encoded]),
            "attention_mask": np.stack([phrase.attention_mask for phrase in encoded]),
        }
        if any(spec.name == "content" for spec in entry.manifest.inputs):
            content = content_size(image.width, image.height, entry.manifest.preprocessing)
            tensors["content"] = np.array([content] * len(encoded), np.int32)
        return tensors

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: GroundOptions) -> GroundResult:
        """Take `box` float32 [n,4] for n phrases, and `score` float32 [n] where the model has one.

        Raises:
            InferenceError: the engine gave something that is not a number.
        """
        assert image is not None
        answers = flow[-1]
        if not all(np.isfinite(tensor).all() for tensor in answers.values()):
            raise InferenceError(f"{entry} gave boxes that are not numbers for this image.")
        boxes = clip(in_original(answers["box"], entry, image), image)
        scores = answers["score"].tolist() if "score" in answers else [None] * len(boxes)
        tokenizer = phrase_tokenizer(entry)
        return GroundResult(
            tuple(
                GroundedPhrase(phrase, as_box(box), score, tokenizer.encode(phrase).truncated)
                for phrase, box, score in zip(options.phrases, boxes, scores, strict=True)
            )
        )
