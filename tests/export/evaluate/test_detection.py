"""AP of detectors whose answers are known: perfect ones, shifted ones, and ones that find nothing or too much."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.client import Client
from export.evaluate.coco import CocoAnnotation, CocoCategory, CocoData, CocoImage, read_coco
from export.evaluate.detection import FIGURES, average_precision, categories_of
from export.evaluate.measuring import EvaluationError
from tests.export.evaluate.conftest import FOUND, is_one_sentence, paint

Ask = Callable[..., Result]
Figures = Callable[..., dict[str, Any]]


def xywh(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


CIRCLE, SQUARE = xywh(FOUND[0]), xywh(FOUND[1])


def document(*boxes: tuple[int, list[float]], names: Sequence[str] = ("circle", "Square"), images: int = 2) -> dict[str, Any]:
    """COCO's format: every image has these (category, box); ids are far from 0 and from the model's."""
    return {
        "images": [{"id": 100 + i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(images)],
        "categories": [{"id": 40 - i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {
                "id": 1000 * i + n,
                "image_id": 100 + i,
                "category_id": 40 - category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i in range(images)
            for n, (category, box) in enumerate(boxes)
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a COCO file beside a folder with its images."""

    def run(described: Any) -> Path:
        for image in described["images"]:
            paint(tmp_path / "images" / image["file_name"])
        (tmp_path / "data.json").write_text(json.dumps(described))
        return tmp_path / "data.json"

    return run


def test_a_perfect_detector(figures: Figures, write: Callable[[Any], Path], tmp_path: Path) -> None:
    data = write(document((0, CIRCLE), (1, SQUARE)))
    told = figures("shapes", "--data", data, "--images", tmp_path / "images")
    assert (told["model"], told["task"], told["images"], told["failed"]) == ("shapes@1", "detect", 2, [])
    assert set(told["figures"]) == set(FIGURES)
    assert (told["figures"]["AP"], told["figures"]["AP75"], told["figures"]["AR_100"]) == (1, 1, 1)
    assert told["figures"]["AP_large"] is None, "there is no large object"
    assert told["by_category"] == {name: {"AP": 1, "AP50": 1, "AP75": 1} for name in ("circle", "Square")}


def test_boxes_that_are_shifted_count_as_far_as_they_overlap(
    figures: Figures, write: Callable[[Any], Path], tmp_path: Path
) -> None:
    """Of a box moved by m of its width w, (w - m) / (w + m) is shared: 0.62 counts at 0.5, 0.55 and 0.6, three of ten."""
    moved = [(category, [x + w * 0.38 / 1.62, y, w, h]) for category, (x, y, w, h) in enumerate((CIRCLE, SQUARE))]
    told = figures("shapes", "--data", write(document(*moved)), "--images", tmp_path / "images")["figures"]
    assert (told["AP50"], told["AP75"], told["AP"]) == (1, 0, pytest.approx(0.3))


def test_a_class_that_is_confused_and_one_that_is_never_there(
    figures: Figures, write: Callable[[Any], Path], tmp_path: Path
) -> None:
    told = figures("shapes", "--data", write(document((1, CIRCLE), (0, CIRCLE))), "--images", tmp_path / "images")
    assert told["by_category"]["circle"]["AP"] == 1
    assert told["by_category"]["Square"]["AP"] == 0, "its box is elsewhere"
    assert told["figures"]["AP"] == pytest.approx(0.5)


def test_only_classes_of_the_data_are_asked_for_and_results_are_kept(
    figures: Figures, write: Callable[[Any], Path], tmp_path: Path
) -> None:
    """pycocotools, on the two files alone, comes to the same."""
    data = write(document((0, CIRCLE), (1, [x + 4 for x in SQUARE])))
    told = figures("shapes", "--data", data, "--images", tmp_path / "images", "--results", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert sorted((row["image_id"], row["category_id"]) for row in rows) == [(100, 39), (100, 40), (101, 39), (101, 40)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data))
        for annotation in truth.dataset["annotations"]:
            annotation["id"] += 1  # an id of 0 is none
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert list(told["figures"].values()) == [pytest.approx(value, abs=1e-6) if value >= 0 else None for value in run.stats]
    assert 0 < told["figures"]["AP"] < 1


def test_names_are_said_otherwise(figures: Figures, ask: Ask, write: Callable[[Any], Path], tmp_path: Path) -> None:
    data = write(document((0, CIRCLE), (2, SQUARE), names=("disc", "tile", "lamp")))
    command = ("--data", data, "--images", tmp_path / "images")
    assert is_one_sentence(ask("shapes", *command), "3 of the 3 names")
    (tmp_path / "map.json").write_text('{"disc": ["circle", "Dreieck"], "tile": "square", "lamp": null}')
    told = figures("shapes", *command, "--map", tmp_path / "map.json")
    assert set(told["by_category"]) == {"disc", "tile"}
    assert told["by_category"]["tile"]["AP"] is None, "there is none"
    assert told["figures"]["AP"] == 1, "a weaker false one comes after the right one"
    (tmp_path / "map.json").write_text('{"disc": "circle", "tile": "Circle", "lamp": null}')
    assert is_one_sentence(ask("shapes", *command, "--map", tmp_path / "map.json"), "both mean class 0 of the model")


def test_a_model_without_labels_has_ids(figures: Figures, write: Callable[[Any], Path], tmp_path: Path) -> None:
    data = write(document((0, CIRCLE), (1, SQUARE), names=("0", "1")))
    assert figures("unnamed", "--data", data, "--images", tmp_path / "images")["figures"]["AP"] == 1


def test_labels_that_are_nearly_the_same_or_numbers(figures: Figures, write: Callable[[Any], Path], tmp_path: Path) -> None:
    """Of `Cup`, `cup` and `0`, whose id is 2: a `cup` of a higher score is no false `Cup`."""
    data = write(document((0, CIRCLE), (1, xywh(FOUND[2])), names=("Cup", "0")))
    told = figures("twins", "--data", data, "--images", tmp_path / "images")
    assert {name: row["AP"] for name, row in told["by_category"].items()} == {"Cup": 1, "0": 1}


def test_images_without_an_answer_are_told_and_count(ask: Ask, write: Callable[[Any], Path], tmp_path: Path) -> None:
    """One of four is missing, one is broken, and one makes the engine fail: a quarter of the objects is found."""
    data = write(document((0, CIRCLE), (1, SQUARE), images=4))
    (tmp_path / "images/0.png").unlink()
    (tmp_path / "images/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    paint(tmp_path / "images/2.png", (255, 255, 255))
    result = ask("shapes", "--data", data, "--images", tmp_path / "images", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "3 of 4 images have no answer" in result.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert [(row["name"], row["code"]) for row in told["failed"]] == [
        ("0.png", "unreadable"),
        ("1.png", "undecodable_image"),
        ("2.png", "inference_failed"),
    ]
    assert told["figures"]["AR_100"] == pytest.approx(0.25)
    assert "AP50" in result.stdout


def test_the_images_lie_beside_the_data_unless_it_is_said(figures: Figures, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(document((0, CIRCLE), names=("circle",), images=1)))
    paint(tmp_path / "0.png")
    assert figures("shapes", "--data", tmp_path / "data.json")["figures"]["AP"] == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0 under NumPy 2
def test_masks_are_measured_beside_boxes(url: str, figures: Figures, write: Callable[[Any], Path], tmp_path: Path) -> None:
    """The truth is the model's own mask of the circle, and of the square the whole box: a polygon that the spot fills in part."""
    described = document((0, CIRCLE), (1, SQUARE))
    write(described)
    with Client(url) as client:
        first, second, _ = (
            client.detect(tmp_path / "images/0.png", model="masked", threshold=0, masks=True).results[0].detections or ()
        )
    left, top, right, bottom = FOUND[1]
    segmentations = [vars(first.mask), [[left, top, right, top, right, bottom, left, bottom]]]
    for annotation in described["annotations"]:
        annotation["segmentation"] = segmentations[annotation["category_id"] == 39]
    filled = mask.area(vars(second.mask)) / (SQUARE[2] * SQUARE[3])
    assert 0.1 < filled < 0.95
    command = ("masked", "--data", write(described), "--images", tmp_path / "images", "--results", tmp_path / "results.json")
    told = figures(*command, "--masks")
    assert told["figures"]["AP"] == 1
    assert told["by_category"]["circle"]["mask_AP"] == 1
    assert told["by_category"]["Square"]["mask_AP"] == pytest.approx(sum(filled >= t for t in np.arange(0.5, 1, 0.05)) / 10)
    assert {*told["figures"]} == {*FIGURES, *(f"mask_{name}" for name in FIGURES)}
    assert {*json.loads((tmp_path / "results.json").read_text())[0]} == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_a_detector_that_looks_for_phrases(ask: Ask, write: Callable[[Any], Path], tmp_path: Path) -> None:
    command = ("--data", write(document((0, CIRCLE))), "--images", tmp_path / "images")
    assert is_one_sentence(ask("seeker", *command), "seeker@1 looks for phrases")


def test_masks_that_are_not_there(ask: Ask, write: Callable[[Any], Path], tmp_path: Path) -> None:
    described = document((0, CIRCLE), (1, SQUARE))
    command = ("--data", write(described), "--images", tmp_path / "images", "--masks")
    assert is_one_sentence(ask("shapes", *command), "shapes@1 has no masks")
    assert is_one_sentence(ask("masked", *command), "of the image 100")
    for image in described["images"]:
        del image["width"]
    write(described)
    assert is_one_sentence(ask("masked", *command), "Masks need the height and width")


def test_no_object_is_found() -> None:
    data = CocoData((CocoImage(1, "a"),), (CocoAnnotation(1, 7, (0, 0, 5, 5)),), (CocoCategory(7, "x"), CocoCategory(8, "y")))
    overall, groups = average_precision(data, [])
    assert (overall["AP"], overall["AP_large"]) == (0, None)
    assert groups == {"x": {"AP": 0, "AP50": 0, "AP75": 0}, "y": {"AP": None, "AP50": None, "AP75": None}}


def test_a_crowd_is_no_miss_and_makes_no_false_positive() -> None:
    truth = (CocoAnnotation(1, 7, (0, 0, 50, 50), iscrowd=1), CocoAnnotation(1, 7, (60, 60, 10, 10)))
    data = CocoData((CocoImage(1, "a"),), truth, (CocoCategory(7, "x"),))
    rows = [
        {"image_id": 1, "category_id": 7, "bbox": box, "score": score}
        for box, score in (([5, 5, 9, 9], 0.9), ([60, 60, 10, 10], 0.5))
    ]
    assert average_precision(data, rows)[0]["AP"] == pytest.approx(1)


def test_each_class_has_one_category() -> None:
    data = CocoData((), (), (CocoCategory(7, "x"), CocoCategory(9, "y")))
    assert categories_of(data, {"x": frozenset((0, 2))}) == {0: 7, 2: 7}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, "is no file in COCO's format: images: Input should be a valid array"),
        ({"images": []}, "has no images"),
        ({"categories": []}, "has no categories"),
        ({"annotations": [{"image_id": 100, "category_id": 40, "bbox": [1, 2, 3]}]}, "annotations.0.bbox"),
        ({"annotations": [{"image_id": 100, "category_id": 40, "bbox": [1, 2, -3, 4]}]}, "greater than or equal to 0"),
        ({"annotations": [{"image_id": 5, "category_id": 40, "bbox": [1, 2, 3, 4]}]}, "is of the image 5"),
        ({"annotations": [{"image_id": 100, "category_id": 5, "bbox": [1, 2, 3, 4]}]}, "is of the category 5"),
        ({"categories": [{"id": 40, "name": "x"}, {"id": 39, "name": "x"}]}, "has the category name 'x' 2 times"),
    ],
)
def test_a_file_that_does_not_fit_together(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps(document((0, CIRCLE)) | change))
    with pytest.raises(EvaluationError) as error:
        read_coco(tmp_path / "data.json")
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "no JSON", "[1, 2]"])
def test_a_file_that_is_something_else(ask: Ask, tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    assert is_one_sentence(ask("shapes", "--data", tmp_path / "data.json"), "is no file in COCO's format")


def test_none_of_the_images_is_there(ask: Ask, write: Callable[[Any], Path], tmp_path: Path) -> None:
    data = write(document((0, CIRCLE)))
    assert is_one_sentence(ask("shapes", "--data", data), "such as 0.png; --images names the folder that has them")
    assert is_one_sentence(ask("shapes", "--data", data, "--images", tmp_path / "none"), "There is no folder")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname"])
def test_no_file_outside_of_the_images_is_sent(ask: Ask, tmp_path: Path, name: str) -> None:
    described = document((0, CIRCLE), images=1)
    described["images"][0]["file_name"] = name
    (tmp_path / "images").mkdir()
    paint(tmp_path / "secret.png")
    (tmp_path / "data.json").write_text(json.dumps(described))
    assert is_one_sentence(ask("shapes", "--data", tmp_path / "data.json", "--images", tmp_path / "images"), "is not inside of")
