"""Accuracy at IoU 0.5 of a grounding model, on a file of images, phrases and the boxes that they speak of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from app.client import PHOTO_FAULTS, Box, Client, Grounding
from export.evaluate.measuring import Asking, EvaluationError, Failure, Measured, read_bytes, share

ENOUGH = 0.5
"""The overlap from which on a box is right."""

FAULTS = PHOTO_FAULTS | {"invalid_value"}  # such as a phrase of too many tokens: the one value that differs between requests


@dataclass(frozen=True)
class Example:
    """A phrase, its image, and the box that it means: xyxy in pixels. `form` is the kind of phrase, where it is told."""

    image: str
    phrase: str
    box: Box
    form: str | None = None

    @property
    def name(self) -> str:
        return f"{self.image}: {self.phrase}"


class _Sentence(BaseModel):
    sent: str = Field(min_length=1)


Phrase = Annotated[str, Field(min_length=1)]


class _Record(BaseModel):
    """One object of the file: `box` (xyxy) or `bbox` (left, top, width, height), and `phrase` or RefCOCO's `sentences`."""

    image: str = Field(validation_alias=AliasChoices("image", "file_name"), min_length=1)
    phrase: Phrase | None = None
    sentences: list[Phrase | _Sentence] = []
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    form: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "_Record":
        if (self.phrase is None) == (not self.sentences):
            raise ValueError("one of phrase and sentences is needed")
        if (self.box is None) == (self.bbox is None):
            raise ValueError("one of box (left, top, right, bottom) and bbox (left, top, width, height) is needed")
        left, top, right, bottom = self.corners
        if right <= left or bottom <= top:
            raise ValueError("the box has no area; box is left, top, right, bottom, and bbox left, top, width, height")
        return self

    @property
    def corners(self) -> Box:
        if self.box is not None:
            return self.box
        assert self.bbox is not None
        left, top, width, height = self.bbox
        return left, top, left + width, top + height

    def examples(self) -> list[Example]:
        said = [self.phrase] if self.phrase is not None else [one if isinstance(one, str) else one.sent for one in self.sentences]
        return [Example(self.image, phrase, self.corners, self.form) for phrase in said]


_RECORD = TypeAdapter(_Record)


def read_phrases(file: Path) -> list[Example]:
    """A JSON list of objects, or one object a line: `{"image": "a.jpg", "phrase": "the red circle", "box": [4, 6, 30, 20]}`.

    Raises:
        EvaluationError: it cannot be read, or is no such file.
    """
    examples: list[Example] = []
    for where, value in _objects(file):
        try:
            examples += _RECORD.validate_python(value).examples()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise EvaluationError(f"{where} is no phrase with its box: {field}{': ' if field else ''}{first['msg']}.") from error
    if not examples:
        raise EvaluationError(f"There is no phrase in {file}.")
    return examples


def _objects(file: Path) -> list[tuple[str, Any]]:
    """The values of the file, each with its place in it for people."""
    try:
        text = read_bytes(file).decode()
        if text.lstrip().startswith("["):
            return [(f"Entry {number} of {file}", value) for number, value in enumerate(json.loads(text), start=1)]
    except ValueError as error:
        raise EvaluationError(f"{file} is not JSON: {error}.") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((f"Line {number} of {file}", json.loads(line)))
            except ValueError as error:
                raise EvaluationError(f"Line {number} of {file} is not JSON: {error}.") from error
    return found


def measure_grounder(client: Client, examples: Sequence[Example], folder: Path, asking: Asking) -> Measured:
    """The share of phrases whose box is right, and the mean overlap; over all, and by form where forms are told.

    Args:
        examples: at least one.
        folder: where the images lie.

    Raises:
        ClientError: something that does not concern one phrase alone.
    """

    def ask(example: Example) -> Grounding:
        return client.ground(folder / example.image, example.phrase, model=asking.model)

    failures: list[Failure] = []
    forms: dict[str, list[float]] = {}
    overlaps: list[float] = []
    for example, answer in asking.each(ask, examples, lambda one: one.name, failures, FAULTS):
        found = (answer.results[0].groundings or ()) if answer else ()
        box = found[0].box if found else None
        overlaps.append(0.0 if box is None else overlap(box, example.box))
        if example.form is not None:
            forms.setdefault(example.form, []).append(overlaps[-1])
    groups = {form: _figures(found) for form, found in forms.items()}
    return Measured("phrases", len(examples), _figures(overlaps), failures, "form", groups)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes xyxy, the second with an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    joint = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / joint


def _figures(overlaps: Sequence[float]) -> dict[str, float | None]:
    return {"accuracy": share([value >= ENOUGH for value in overlaps]), "mean_iou": sum(overlaps) / len(overlaps)}
