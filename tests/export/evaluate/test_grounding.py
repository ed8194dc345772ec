"""Accuracy of a grounding model that gives one box for every phrase."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from export.evaluate.grounding import Example, overlap, read_phrases
from export.evaluate.measuring import EvaluationError
from tests.export.evaluate.conftest import POINTED, is_one_sentence, paint

Ask = Callable[..., Result]
Figures = Callable[..., dict[str, Any]]
LEFT, TOP, RIGHT, BOTTOM = POINTED


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def said(phrase: str, box: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"image": "a.png", "phrase": phrase, "box": list(box), **more}


def test_boxes_are_right_from_an_overlap_of_a_half_on(figures: Figures, tmp_path: Path) -> None:
    """Of boxes as high as the model's and as wide, moved by m of the width w, (w - m) / (w + m) is shared."""
    paint(tmp_path / "images/a.png")
    width = RIGHT - LEFT
    near, far = ([LEFT + width * m, TOP, RIGHT + width * m, BOTTOM] for m in (0.32, 0.35))
    (tmp_path / "phrases.jsonl").write_text(
        lines(
            said("red circle", POINTED, form="colour"),
            said("blue", near, form="colour"),
            said("left", far, form="position"),
            said("square", [0, 0, 5, 5], form="position"),
        )
    )
    told = figures("phrases", "--data", tmp_path / "phrases.jsonl", "--images", tmp_path / "images")
    assert (told["model"], told["task"], told["phrases"], told["failed"]) == ("phrases@1", "ground", 4, [])
    assert told["figures"]["accuracy"] == 0.5
    assert told["figures"]["mean_iou"] == pytest.approx((1 + 0.68 / 1.32 + 0.65 / 1.35) / 4, abs=0.002)
    assert {form: row["accuracy"] for form, row in told["by_form"].items()} == {"colour": 1, "position": 0}


def test_phrases_without_an_answer_are_told_and_count(ask: Ask, tmp_path: Path) -> None:
    """A phrase of too many tokens for the model, and an image that is missing."""
    paint(tmp_path / "a.png")
    long = "the red circle left of the blue square"
    (tmp_path / "phrases.jsonl").write_text(
        lines(said("red", POINTED), said(long, POINTED), said("blue", POINTED) | {"image": "b.png"})
    )
    result = ask("phrases", "--data", tmp_path / "phrases.jsonl", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "2 of 3 phrases have no answer" in result.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert [(row["name"], row["code"]) for row in told["failed"]] == [
        (f"a.png: {long}", "invalid_value"),
        ("b.png: blue", "unreadable"),
    ]
    assert told["figures"]["accuracy"] == pytest.approx(1 / 3)
    assert "by_form" not in told


def test_a_list_and_the_sentences_of_refcoco_are_read(tmp_path: Path) -> None:
    file = tmp_path / "refs.json"
    sentences = [{"sent": "red one", "sent_id": 3}, "left circle"]
    file.write_text(json.dumps([{"file_name": "a.png", "bbox": [10, 20, 30, 40], "sentences": sentences, "ref_id": 1}], indent=2))
    assert read_phrases(file) == [Example("a.png", phrase, (10, 20, 40, 60)) for phrase in ("red one", "left circle")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "There is no phrase in"),
        ("[]", "There is no phrase in"),
        ("[{]", "is not JSON"),
        ('{"image": "a"', "Line 1 of"),
        (lines(said("red", POINTED)) + "\nred\n", "Line 3 of"),
        (lines({"phrase": "red", "box": POINTED}), "image: Field required"),
        (lines({"image": "a", "box": POINTED}), "one of phrase and sentences is needed"),
        (lines(said("red", POINTED, bbox=POINTED)), "one of box (left, top, right, bottom) and bbox"),
        (lines(said("red", [30, 20, 10, 40])), "the box has no area"),
        (lines(said("red", [1, 2, 3])), "box"),
        (lines(said("", POINTED)), "phrase"),
        (json.dumps([said("red", POINTED), 3]), "Entry 2 of"),
        (json.dumps({"images": [], "annotations": [], "categories": []}), "image: Field required"),
    ],
)
def test_another_file_is_no_phrases(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "phrases.json").write_text(text)
    with pytest.raises(EvaluationError) as error:
        read_phrases(tmp_path / "phrases.json")
    assert words in str(error.value)


def test_what_says_nothing_of_grounding_is_refused(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"red": "blue"}')
    paint(tmp_path / "a.png")
    (tmp_path / "phrases.jsonl").write_text(lines(said("red", POINTED)))
    command = ("phrases", "--data", tmp_path / "phrases.jsonl")
    assert is_one_sentence(ask(*command, "--map", tmp_path / "map.json"), "has no classes")
    assert is_one_sentence(ask(*command, "--results", tmp_path / "out.json"), "--results is for detectors")
    assert is_one_sentence(ask(*command, "--masks"), "--masks is for detectors, and phrases@1 is a model for ground")


def test_overlap_is_shared_area_by_joint_area() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == overlap((0, 0, 10, 10), (30, 30, 40, 40)) == 0
    assert overlap((5, 5, 5, 5), (0, 0, 10, 10)) == 0
