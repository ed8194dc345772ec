"""Boxes, masks and labels on pictures of any size: where they are, that they can be read, and that none leaves the picture."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from app import drawing
from app.drawing import COLOURS, Mark, draw
from app.masks import paste

GREY = (128, 128, 128)


def drawn(size: tuple[int, int], *marks: Mark) -> np.ndarray:
    picture = Image.new("RGB", size, GREY)
    draw(picture, marks)
    return np.asarray(picture)


def is_colour(pixels: np.ndarray, number: int) -> np.ndarray:
    return (pixels == COLOURS[number]).all(-1)


@pytest.mark.parametrize(("size", "line", "letters"), [((300, 200), 2, 9), ((1200, 900), 3, 16), ((6000, 4000), 15, 80)])
def test_lines_and_letters_grow_with_the_picture(size: tuple[int, int], line: int, letters: int) -> None:
    width, height = size
    left, top, right, bottom = width // 4, height // 2, width * 3 // 4, height * 7 // 8
    pixels = drawn(size, Mark((left, top, right, bottom), "dog", "1", 0, 0.93))
    column = is_colour(pixels[:, (left + right) // 2], 0)
    lower = np.flatnonzero(column[(top + bottom) // 2 :])
    assert len(lower) >= line
    assert lower.max() + (top + bottom) // 2 == bottom - 1
    plate = pixels[:top, left : left + width // 5]
    inside = is_colour(plate, 0).any(1)
    assert inside.sum() >= letters
    ink = (plate > 150).all(-1)
    assert np.ptp(np.flatnonzero(ink.any(1))) >= letters * 0.5


TEXTS = ["dog", "the small red circle to the left of the big blue square", "", "Ärger", "红色圆", "W" * 9000, "a\nb\tc"]


@pytest.mark.parametrize("size", [(300, 200), (40, 30), (1, 1), (3, 500), (900, 12)])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_no_label_leaves_the_picture(size: tuple[int, int], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width, height = size
    boxes = [(0, 0, width, height), (width - 0.4, 0, width, 2), (0, height - 1, 5, height), (width / 2, height / 2, width, height)]
    written: list[tuple[float, float, float, float]] = []
    write = ImageDraw.ImageDraw.text

    def text_at(canvas: ImageDraw.ImageDraw, place: tuple[float, float], *arguments: object, **options: object) -> None:
        written.append(canvas.textbbox(place, str(arguments[0]), arguments[2], **options))
        write(canvas, place, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text_at)
    drawn(size, *(Mark(box, text, str(number + 1), number, 0.5) for number, box in enumerate(boxes)))
    assert all(0 <= left <= right <= width and 0 <= top <= bottom <= height for left, top, right, bottom in written), written
    if size == (300, 200):
        assert len(written) == len(boxes)


def test_what_the_font_lacks_is_written_without_accents_or_by_its_number() -> None:
    font = drawing._font(20)

    def written(caption: str) -> str:
        return drawing._fit(Mark((0, 0, 9, 9), caption, "7", 0, 0.5), font, 500)

    assert [written(caption) for caption in ("dog", "Ärger  im\nCafé", "красный", "红 red")] == [
        "dog 0.50", "Arger im Cafe 0.50", "7 0.50", "7 0.50",
    ]  # fmt: skip


def test_a_long_caption_is_shortened_and_keeps_its_score() -> None:
    font = drawing._font(20)
    text = drawing._fit(Mark((0, 0, 9, 9), "the small red circle to the left", "1", 0, 0.51), font, 200)
    assert text.startswith("the small")
    assert text.endswith("… 0.51")
    assert font.getlength(text) <= 200


def test_labels_of_one_box_stand_below_one_another() -> None:
    box = (50, 60, 150, 150)
    pixels = drawn((300, 200), *(Mark(box, "dog", "1", number) for number in range(3)))
    rows = [np.flatnonzero(is_colour(pixels[:148, 53:70], number).sum(1) > 3) for number in range(3)]
    assert all(len(found) > 8 for found in rows)
    assert rows[0].max() < rows[1].min() <= rows[1].max() < rows[2].min()


def test_the_first_mark_is_on_top() -> None:
    box = (50, 50, 150, 150)
    assert is_colour(drawn((300, 200), Mark(box, "a", "1", 0), Mark(box, "b", "2", 1))[149, 60:140], 0).all()


def test_a_mask_tints_what_it_covers_and_no_more() -> None:
    box = (40.0, 60.0, 240.0, 180.0)
    mask = paste(np.tri(16, dtype=bool), box, 300, 200)
    pixels = drawn((300, 200), Mark(box, "", "1", 3, None, mask))
    assert (pixels[160, 100] != GREY).all()
    assert not is_colour(pixels[160, 100], 3)
    assert (pixels[90, 200] == GREY).all()
