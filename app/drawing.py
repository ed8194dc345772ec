"""Boxes, masks and labels drawn onto the upright original, legible whatever its size."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from app.masks import Box, Mask

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    *((230, 57, 70), (0, 150, 199), (255, 183, 3), (43, 147, 72), (157, 78, 221), (251, 133, 0)),
    *((0, 180, 160), (214, 40, 140), (112, 86, 60), (70, 90, 200), (150, 190, 30), (255, 130, 150)),
)
MASK_OPACITY = 115  # of 255
ELLIPSIS = "…"
SMALLEST_FONT = 11  # pixels
STEPS = 8  # labels below one another until they may overlap
NOTHING = "\U0010ffff"  # no font has it: drawn as every character that a font lacks


@dataclass(frozen=True)
class Mark:
    """What is drawn for one answer. `box` xyxy in pixels of the picture; `number` chooses the colour.

    `caption` is followed by `score` where there is one. Where the font lacks a letter it is written without its accents, and where
    that is not enough `short` stands in its place.
    """

    box: Box
    caption: str
    short: str
    number: int
    score: float | None = None
    mask: Mask | None = None

    @property
    def colour(self) -> Colour:
        return COLOURS[self.number % len(COLOURS)]


def draw(picture: Image.Image, marks: Sequence[Mark]) -> None:
    """Draw `marks` onto the RGB `picture`, the first of them on top, labels above all else and inside of the picture."""
    scale = (picture.width * picture.height) ** 0.5
    line, font = max(2, round(scale / 300)), _font(max(SMALLEST_FONT, round(scale / 45)))
    lowest_first = marks[::-1]
    for mark in lowest_first:
        _tint(picture, mark)
    canvas = ImageDraw.Draw(picture)
    for mark in lowest_first:
        _outline(canvas, mark, line)
    plates: list[_Plate] = []
    for mark in marks:
        if (plate := _place(mark, font, line, picture.size, plates)) is not None:
            plates.append(plate)
    for plate in reversed(plates):
        plate.draw(canvas, font)


def _tint(picture: Image.Image, mark: Mark) -> None:
    if mark.mask is None:
        return
    left, top, inside = mark.mask.region()
    if inside.size:
        picture.paste(mark.colour, (left, top), Image.fromarray(inside.astype(np.uint8) * np.uint8(MASK_OPACITY)))


def _outline(canvas: ImageDraw.ImageDraw, mark: Mark, line: int) -> None:
    """A box of the mark's colour with a dark rim, so that it stands out from a ground of its own colour."""
    width, height = canvas.im.size
    left, top = (min(max(0, round(place)), size - 1) for place, size in zip(mark.box[:2], (width, height), strict=True))
    right, bottom = (min(max(0, round(place)), size) for place, size in zip(mark.box[2:], (width, height), strict=True))
    corners = (left, top, max(left, right - 1), max(top, bottom - 1))
    rim = max(1, line // 4)
    canvas.rectangle(tuple(place + by for place, by in zip(corners, (-rim, -rim, rim, rim), strict=True)), None, (20, 20, 20), rim)
    canvas.rectangle(corners, None, mark.colour, line)


@dataclass(frozen=True)
class _Plate:
    """A label: `left`, `top`, `across` and `down` in pixels, and where its letters begin and stand."""

    left: int
    top: int
    across: int
    down: int
    text: str
    start: tuple[int, int]
    colour: Colour

    def covers(self, other: "_Plate") -> bool:
        beside = self.left >= other.left + other.across or other.left >= self.left + self.across
        return not (beside or self.top >= other.top + other.down or other.top >= self.top + self.down)

    def draw(self, canvas: ImageDraw.ImageDraw, font: Font) -> None:
        canvas.rectangle((self.left, self.top, self.left + self.across - 1, self.top + self.down - 1), self.colour)
        canvas.text(self.start, self.text, _ink(self.colour), font, anchor="ls")


def _place(mark: Mark, font: Font, line: int, size: tuple[int, int], taken: Sequence[_Plate]) -> _Plate | None:
    """A plate above the box, or inside where the picture ends or `taken` is in the way; None where no text fits into `size`."""
    width, height = size
    margin = max(2, line)
    text = _fit(mark, font, width - 2 * margin)
    ascent, descent = _extent(font)
    across, down = round(font.getlength(text)) + 2 * margin, ascent + descent + margin
    if not text or across > width or down > height:
        return None
    left, top = min(max(0, round(mark.box[0])), width - across), round(mark.box[1])
    places = [min(max(0, top + step * down), height - down) for step in range(-1 if top >= down else 0, STEPS)]
    plates = [_Plate(left, y, across, down, text, (left + margin, y + margin // 2 + ascent), mark.colour) for y in places]
    return next((plate for plate in plates if not any(plate.covers(other) for other in taken)), plates[0])


def _fit(mark: Mark, font: Font, room: int) -> str:
    """The caption and the score, without the score or the caption's end where they are wider than `room`; empty if nothing fits."""
    plain = " ".join(mark.caption.split())
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(letter))
    caption = next((text for text in (plain, bare) if _has_all(font, text)), mark.short)
    for text in _shorter(caption, "" if mark.score is None else f" {mark.score:.2f}"):
        if font.getlength(text) <= room:
            return text
    return ""


def _shorter(caption: str, score: str) -> Iterator[str]:
    yield caption + score
    for end in range(min(len(caption) - 1, 200), 2, -1):
        yield caption[:end].rstrip() + ELLIPSIS + score
    yield from (score.strip() or ELLIPSIS, ELLIPSIS)


def _has_all(font: Font, text: str) -> bool:
    """Whether the font can write all of `text`."""
    missing = bytes(font.getmask(NOTHING))
    return all(bytes(font.getmask(character)) != missing for character in {*text} - {" "})


def _extent(font: Font) -> tuple[int, int]:
    """Pixels above and below the line on which letters stand."""
    box = font.getbbox("Åjgq|", anchor="ls")
    return -int(box[1]), int(box[3])


def _ink(ground: Colour) -> Colour:
    red, green, blue = ground
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)


@lru_cache(maxsize=64)
def _font(size: int) -> Font:
    """The font that comes with Pillow, of English letters; `size` in pixels."""
    return ImageFont.load_default(size)
