"""Images, objects and categories as COCO's format has them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from export.evaluate.measuring import EvaluationError, read_bytes

Side = Annotated[FiniteFloat, Field(ge=0)]


@dataclass(frozen=True)
class CocoImage:
    """`height` and `width` in pixels, which masks need."""

    id: int
    file_name: str
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class CocoCategory:
    id: int
    name: str


@dataclass(frozen=True)
class CocoAnnotation:
    """An object: `bbox` is left, top, width, height in pixels; `area` that of the box where it is not given.

    `segmentation`, which only masks need: polygons, or run lengths.
    """

    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, Side, Side]
    area: FiniteFloat | None = None
    iscrowd: int = 0
    segmentation: Any = None


@dataclass(frozen=True)
class CocoData:
    """What is needed of a file in COCO's format."""

    images: tuple[CocoImage, ...]
    annotations: tuple[CocoAnnotation, ...]
    categories: tuple[CocoCategory, ...]

    def restricted(self, names: Mapping[str, object]) -> "CocoData":
        """With the categories of these names alone; all images stay."""
        categories = tuple(category for category in self.categories if category.name in names)
        ids = {category.id for category in categories}
        return replace(self, categories=categories, annotations=tuple(one for one in self.annotations if one.category_id in ids))


@dataclass(frozen=True)
class _RunLengths:
    size: tuple[int, int]
    counts: str | list[int]


_DATA = TypeAdapter(CocoData)
_SEGMENTATION: TypeAdapter[Any] = TypeAdapter(
    Annotated[list[Annotated[list[FiniteFloat], Field(min_length=6)]], Field(min_length=1)] | _RunLengths
)


def read_coco(file: Path) -> CocoData:
    """
    Raises:
        EvaluationError: it cannot be read, is no such file, or does not fit together.
    """
    try:
        data = _DATA.validate_json(read_bytes(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise EvaluationError(f"{file} is no file in COCO's format: {where}{': ' if where else ''}{first['msg']}.") from error
    for what, values in (
        ("the image id", [image.id for image in data.images]),
        ("the category id", [category.id for category in data.categories]),
        ("the category name", [category.name for category in data.categories]),
    ):
        if not values:
            raise EvaluationError(f"{file} has no {'images' if 'image' in what else 'categories'}.")
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise EvaluationError(f"{file} has {what} {value!r} {times} times.")
    images, categories = {image.id for image in data.images}, {category.id for category in data.categories}
    for number, one in enumerate(data.annotations):
        if one.image_id not in images:
            raise EvaluationError(
                f"Annotation {number} of {file}, counted from 0, is of the image {one.image_id}, which it does not have."
            )
        if one.category_id not in categories:
            raise EvaluationError(
                f"Annotation {number} of {file}, counted from 0, is of the category {one.category_id}, which it does not have."
            )
    return data


def check_masks(data: CocoData, file: Path) -> None:
    """
    Raises:
        EvaluationError: an object has no mask that can be read, or an image has no size.
    """
    if any(image.height is None or image.width is None for image in data.images):
        raise EvaluationError(f"Masks need the height and width of every image, and {file} does not have them.")
    for one in data.annotations:
        try:
            _SEGMENTATION.validate_python(one.segmentation)
        except ValidationError as error:
            raise EvaluationError(
                f"An annotation of the image {one.image_id} in {file} has no mask: a segmentation of polygons or run lengths."
            ) from error
