"""Average precision of a detector, of its boxes and masks, on data in COCO's format, as pycocotools computes it."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.client import Client, DetectedObject, Detection
from export.evaluate.coco import CocoCategory, CocoData, CocoImage
from export.evaluate.measuring import Asking, EvaluationError, Failure, Measured, MissingToolError
from export.evaluate.naming import Classes

MOST = 100
"""Detections in an image that count, as COCO has it."""

FIGURES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""COCO's twelve, in the order of pycocotools."""

CocoResult = dict[str, Any]
"""A row of COCO's results: `image_id`, `category_id`, `bbox` (left, top, width, height), `score`, and of masks `segmentation`."""

Kind = Literal["bbox", "segm"]
"""What is compared: boxes, or masks."""


def categories_of(data: CocoData, meaning: Mapping[str, frozenset[int]]) -> dict[int, int]:
    """The category of each class id of the model that means one.

    Raises:
        EvaluationError: two categories mean the same class, whose detections then could be of either.
    """
    found: dict[int, CocoCategory] = {}
    for category in data.categories:
        for number in meaning.get(category.name, ()):
            if number in found:
                raise EvaluationError(
                    f"The categories {found[number].name!r} and {category.name!r} both mean class {number} of the model; "
                    "leave one out with --map, or make them one in the data."
                )
            found[number] = category
    return {number: category.id for number, category in found.items()}


def detect(
    client: Client,
    data: CocoData,
    folder: Path,
    categories: Mapping[int, int],
    classes: Classes,
    *,
    asking: Asking,
    masks: bool = False,
) -> tuple[list[CocoResult], list[Failure]]:
    """What the model finds in every image, at any score: its best `MOST` of the classes that mean a category.

    Args:
        folder: where the images lie.
        categories: ids of categories by class id.
        classes: of the model.
        masks: whether masks are asked for, too.

    Raises:
        ClientError: something that does not concern one image alone.
    """
    only = [classes.asked(number) for number in sorted(categories)] if len(categories) < classes.count else []

    def ask(image: CocoImage) -> Detection:
        return client.detect(
            folder / image.file_name, model=asking.model, threshold=0, max_detections=MOST, classes=only, masks=masks
        )

    results: list[CocoResult] = []
    failures: list[Failure] = []
    for image, answer in asking.each(ask, data.images, lambda one: one.file_name, failures):
        given = (answer.results[0].detections or ()) if answer else ()
        results += [_result(image, categories[found.class_id], found) for found in given if found.class_id in categories]
    return results, failures


def _result(image: CocoImage, category: int, found: DetectedObject) -> CocoResult:
    left, top, right, bottom = found.box
    row = {"image_id": image.id, "category_id": category, "bbox": [left, top, right - left, bottom - top], "score": found.score}
    return row if found.mask is None else row | {"segmentation": vars(found.mask)}


def results_json(results: Sequence[CocoResult]) -> str:
    """COCO's results, a row a line; pycocotools loads them beside the file that was evaluated on."""
    return "[" + ",\n".join(map(json.dumps, results)) + "]\n"


def average_precision(
    data: CocoData, results: Sequence[CocoResult], kind: Kind = "bbox"
) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
    """COCO's twelve figures, and AP, AP50 and AP75 of each category by its name; None where the data has nothing of the kind.

    Raises:
        MissingToolError: pycocotools is not installed.
    """
    evaluation = _cocoeval()
    truth = [
        {"image_id": one.image_id, "category_id": one.category_id, "bbox": list(one.bbox), "iscrowd": one.iscrowd}
        | {"area": one.bbox[2] * one.bbox[3] if one.area is None else one.area, "segmentation": one.segmentation}
        for one in data.annotations
    ]
    found = [result | {"area": _area(result, kind), "iscrowd": 0} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        run = evaluation(_indexed(data, truth), _indexed(data, found), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = run.eval["precision"]  # [IoU, recall, category, area, detections]
    names = {category.id: category.name for category in data.categories}
    groups = {}
    for row, number in enumerate(run.params.catIds):
        of_all = precision[:, :, row, 0, -1]
        groups[names[number]] = {"AP": _mean(of_all), "AP50": _mean(of_all[0]), "AP75": _mean(of_all[5])}
    return {name: _known(float(value)) for name, value in zip(FIGURES, run.stats, strict=True)}, groups


def measure_detector(
    data: CocoData, results: Sequence[CocoResult], failures: Sequence[Failure], *, masks: bool = False
) -> Measured:
    """The figures of what `detect` gave; those of masks begin with `mask_`.

    Raises:
        MissingToolError: pycocotools is not installed.
    """
    figures, groups = average_precision(data, results)
    if masks:
        overall, by_category = average_precision(data, results, "segm")
        figures |= _of_masks(overall)
        groups = {name: row | _of_masks(by_category[name]) for name, row in groups.items()}
    return Measured("images", len(data.images), figures, failures, "category", groups)


def check_tools() -> None:
    """
    Raises:
        MissingToolError: pycocotools is not installed.
    """
    _cocoeval()


def _cocoeval() -> Any:
    try:
        from pycocotools.cocoeval import COCOeval  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingToolError('pycocotools computes AP and is not installed; pip install -e ".[export]" brings it.') from error
    return COCOeval


def _indexed(data: CocoData, rows: Sequence[dict[str, Any]]) -> Any:
    """A COCO object of these annotations, numbered from 1 on: pycocotools takes the id 0 for none."""
    from pycocotools.coco import COCO  # noqa: PLC0415

    coco = COCO()
    coco.dataset = {
        "images": [vars(image) for image in data.images],
        "categories": [vars(category) for category in data.categories],
        "annotations": [{**row, "id": number} for number, row in enumerate(rows, start=1)],
    }
    coco.createIndex()
    return coco


def _area(result: CocoResult, kind: Kind) -> float:
    """In pixels, of what is compared."""
    if kind == "bbox":
        return float(result["bbox"][2] * result["bbox"][3])
    from pycocotools import mask  # noqa: PLC0415

    return float(mask.area(result["segmentation"]))


def _of_masks(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {f"mask_{name}": value for name, value in figures.items()}


def _mean(precision: NDArray[np.float64]) -> float | None:
    """Over what is known; -1 says that it is not."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _known(value: float) -> float | None:
    return None if value < 0 else value
