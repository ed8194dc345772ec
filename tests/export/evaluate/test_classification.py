"""Top-1 and top-5 of a classifier on folders of images whose answers are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image, ImageOps

from export.evaluate.classification import measure_classifier, read_folder
from export.evaluate.command import served
from export.evaluate.measuring import Asking
from export.evaluate.plans import find
from tests.export.evaluate.conftest import is_one_sentence, paint

ROOT = Path(__file__).parents[3]
Ask = Callable[..., Result]
Figures = Callable[..., dict[str, Any]]

RED, CYAN = (220, 10, 10), (10, 220, 220)


def test_right_and_wrong_are_counted(figures: Figures, tmp_path: Path) -> None:
    """Red pictures in `red`; in `Cyan` one that is, and one whose best answer is red and whose worst is cyan."""
    for name in ("red/a.png", "red/deep/b.JPG", "Cyan/b.png"):
        paint(tmp_path / "data" / name, RED)
    paint(tmp_path / "data/Cyan/a.png", CYAN)
    (tmp_path / "data/red/notes.txt").write_text("no image")
    told = figures("colours", "--data", tmp_path / "data")
    assert (told["model"], told["task"], told["images"]) == ("colours@1", "classify", 4)
    assert told["figures"] == {"top1": 0.75, "top5": 0.75}
    assert told["by_class"] == {"Cyan": {"top1": 0.5, "top5": 0.5}, "red": {"top1": 1, "top5": 1}}


def test_the_second_best_is_among_the_best_five(figures: Figures, tmp_path: Path) -> None:
    paint(tmp_path / "data/magenta/a.png", RED)
    assert figures("colours", "--data", tmp_path / "data")["figures"] == {"top1": 0, "top5": 1}


def test_a_folder_can_mean_several_labels_or_be_left_out(figures: Figures, tmp_path: Path) -> None:
    for name in ("warm/a.png", "lamp/b.png"):
        paint(tmp_path / "data" / name, RED)
    (tmp_path / "map.json").write_text('{"warm": ["yellow", "red"], "lamp": null}')
    told = figures("colours", "--data", tmp_path / "data", "--map", tmp_path / "map.json")
    assert (told["images"], told["figures"]["top1"]) == (1, 1)


def test_images_without_an_answer_are_told_and_count(ask: Ask, tmp_path: Path) -> None:
    paint(tmp_path / "data/red/a.png", RED)
    (tmp_path / "data/red/b.png").write_bytes(b"GIF89a")
    result = ask("colours", "--data", tmp_path / "data", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "red/b.png: " in result.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["figures"]["top1"], [row["name"] for row in told["failed"]]) == (0.5, ["red/b.png"])


def test_folders_that_hold_nothing(ask: Ask, tmp_path: Path) -> None:
    assert is_one_sentence(ask("colours", "--data", tmp_path), "has no sub-folders")
    (tmp_path / "red").mkdir()
    assert is_one_sentence(ask("colours", "--data", tmp_path), "There is no image in")
    paint(tmp_path / "red/a.png")
    (tmp_path / "rad").mkdir()
    paint(tmp_path / "rad/a.png")
    assert is_one_sentence(ask("colours", "--data", tmp_path), "'rad' (perhaps 'red')")
    assert is_one_sentence(ask("colours", "--data", tmp_path / "red/a.png"), "is none")
    assert is_one_sentence(ask("colours", "--data", tmp_path, "--images", tmp_path), "--images says nothing")


def test_the_bundled_classifier(tmp_path: Path) -> None:
    """A photo of an espresso, three ways, and once among the pizzas; the gateway is in this process."""
    photo = Image.open(ROOT / "docs/photos/espresso.jpg")
    for name, image in (("espresso/a.png", photo), ("espresso/b.png", ImageOps.mirror(photo)), ("Pizza/c.png", photo)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.resize((300, 200)).save(tmp_path / name)
    examples = read_folder(tmp_path)
    with served(None, ROOT / "model_repository") as client:
        subject = find(client, "convnext-50")
        espresso, pizza = (subject.classes.called(name) for name in ("espresso", "pizza"))
        measured = measure_classifier(
            client, examples, {"espresso": espresso, "Pizza": pizza}, 50, Asking(subject.name, requests=2)
        )
    assert measured.failures == []
    assert measured.figures["top1"] == pytest.approx(2 / 3)
    assert measured.groups["espresso"]["top1"] == 1
    assert measured.groups["Pizza"]["top1"] == 0
