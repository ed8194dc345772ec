"""Names in the data find the classes that they mean, or the error says which do not and what to write."""

from pathlib import Path

import pytest

from export.evaluate.measuring import EvaluationError
from export.evaluate.naming import Classes, Renaming, match, read_renaming

NAMED = Classes(5, ("couch", "potted plant", "Chihuahua", "German shepherd", "couch"))


def meant(*names: str, classes: Classes = NAMED, **renaming: str | list[str] | None) -> dict[str, frozenset[int]]:
    return match(names, classes, renaming, model="m@1", data=Path("data.json"))


def test_names_are_labels_as_they_are_or_nearly_so() -> None:
    assert meant("couch", "Potted_Plant") == {"couch": {0, 4}, "Potted_Plant": {1}}


def test_the_very_label_comes_before_one_that_is_alike() -> None:
    assert meant("Cup", "cup", classes=Classes(2, ("cup", "Cup"))) == {"Cup": {1}, "cup": {0}}


def test_without_a_label_a_number_is_an_id() -> None:
    assert meant("3", classes=Classes(4, ())) == {"3": {3}}
    assert meant("1", classes=Classes(2, ("1", "0"))) == {"1": {0}}, "a label comes first"


def test_a_name_can_mean_another_label_several_or_none() -> None:
    dogs = ["Chihuahua", "German shepherd"]
    assert meant("dog", "sofa", "lamp", dog=dogs, sofa="couch", lamp=None) == {"dog": {2, 3}, "sofa": {0, 4}}


@pytest.mark.parametrize(
    ("names", "classes", "renaming", "words"),
    [
        (
            ("couch", "coach"),
            NAMED,
            {},
            "1 of the 2 names in data.json mean no class of m@1: 'coach' (perhaps 'couch'); its labels are",
        ),
        (("zebra",), NAMED, {}, "'zebra'; its labels are 'couch', 'potted plant'"),
        (("zebra",), NAMED, {}, "--map FILE"),
        (("couch",), NAMED, {"couch": "chihuahau"}, "'chihuahau' of --map (perhaps 'chihuahua')"),
        (("9",), Classes(4, ()), {}, "'9'; it has no labels, only ids from 0 to 3"),
        (("couch",), NAMED, {"sofa": "couch"}, "--map speaks of 'sofa', and data.json does not; it has 'couch'"),
        (("couch",), NAMED, {"couch": None}, "--map leaves out everything"),
        (tuple(f"name {n}" for n in range(30)), NAMED, {}, "and 22 more"),
    ],
)
def test_what_means_nothing_is_told(names: tuple[str, ...], classes: Classes, renaming: Renaming, words: str) -> None:
    with pytest.raises(EvaluationError) as error:
        match(names, classes, renaming, model="m@1", data=Path("data.json"))
    assert words in str(error.value)


def test_a_renaming_is_read(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text('{"sofa": "couch", "dog": ["a", "b"], "lamp": null}')
    assert read_renaming(file) == {"sofa": "couch", "dog": ["a", "b"], "lamp": None}


@pytest.mark.parametrize("text", ["", "[]", '{"sofa": 3}', '{"sofa": '])
def test_another_file_is_no_renaming(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(EvaluationError, match="is not a JSON object of names"):
        read_renaming(tmp_path / "map.json")
