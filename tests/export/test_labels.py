"""The names of the classes."""

from pathlib import Path

import pytest

from export.labels import choose_labels
from export.spec import ExportError


def test_the_users_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("Katze\n grüne Schlange \n\n", encoding="utf-8")

    assert choose_labels(tmp_path / "labels.txt", ("cat", "snake"), 2) == ("Katze", "grüne Schlange")


def test_as_many_labels_as_classes(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")

    with pytest.raises(ExportError, match="2 labels, but the network has 3 classes"):
        choose_labels(tmp_path / "labels.txt", (), 3)


def test_labels_of_another_head_are_no_labels() -> None:
    assert choose_labels(None, ("a", "b"), 2) == ("a", "b")
    assert choose_labels(None, ("a", "b"), 3) == ()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe")

    for file in (tmp_path / "labels.txt", tmp_path / "missing.txt"):
        with pytest.raises(ExportError, match=file.name):
            choose_labels(file, (), 1)


@pytest.mark.parametrize(("text", "line"), [("a\n\nb\n", "Line 2"), ("a\nb\na\n", "Line 3")])
def test_every_class_has_a_label_of_its_own(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "labels.txt").write_text(text)

    with pytest.raises(ExportError, match=line):
        choose_labels(tmp_path / "labels.txt", (), 3)


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n", encoding="utf-8-sig")

    assert choose_labels(tmp_path / "labels.txt", (), 2) == ("cat", "dog")
