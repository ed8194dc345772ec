"""The images that verification looks at: synthetic, seeded, of many sizes and formats; three small ones travel with the engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class GoldenImage:
    """An encoded image. One that `travels` is published as `golden/NAME` with the engine and its expected outputs."""

    name: str
    data: bytes
    travels: bool = False


@cache
def golden_images() -> tuple[GoldenImage, ...]:
    """Eight images; one is a JPEG so large that it is decoded at a fraction of its size where that is allowed."""
    return (
        GoldenImage("landscape.jpg", _jpeg(160, 120, seed=1), travels=True),
        GoldenImage("portrait.png", _png(72, 96, seed=2), travels=True),
        GoldenImage("rotated.jpg", _jpeg(144, 108, seed=3, orientation=6), travels=True),
        GoldenImage("photo.jpg", _jpeg(1200, 800, seed=4)),
        GoldenImage("large.jpg", _jpeg(2400, 1600, seed=5)),
        GoldenImage("tall.jpg", _jpeg(640, 300, seed=6, orientation=8)),
        GoldenImage("square.png", _png(256, 256, seed=7)),
        GoldenImage("wide.png", _png(640, 200, seed=8)),
    )


def travelling() -> Iterator[GoldenImage]:
    """The images that are published with the engine."""
    return (image for image in golden_images() if image.travels)


def _jpeg(width: int, height: int, seed: int, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return _encode(_draw(width, height, seed), "JPEG", quality=88, exif=exif)


def _png(width: int, height: int, seed: int) -> bytes:
    return _encode(_draw(width, height, seed), "PNG")


def _encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _draw(width: int, height: int, seed: int) -> Image.Image:
    """RGB: a coloured gradient, a fine texture, filled shapes and lines of dark strokes like text, all drawn from `seed`."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(_background(width, height, random))
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse, draw.rectangle, draw.ellipse, draw.rectangle):
        left, right = sorted(random.uniform(0, width, 2))
        top, bottom = sorted(random.uniform(0, height, 2))
        shape((left, top, right, bottom), fill=tuple(int(level) for level in random.integers(0, 256, 3)))
    _write_strokes(draw, width, height, random)
    return image


def _background(width: int, height: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """[height,width,3]: per channel another level, direction and contrast of gradient, and a wave of a few pixels' length."""
    y, x = np.mgrid[0:height, 0:width]
    levels, contrasts, directions = random.uniform(40, 215, 3), random.uniform(30, 110, 3), random.uniform(0, 2 * np.pi, 3)
    slope = x[..., None] / width * np.cos(directions) + y[..., None] / height * np.sin(directions)
    length = random.uniform(4, 9)
    texture = 12 * np.sin(2 * np.pi * (x + 0.6 * y) / length)[..., None] * random.uniform(0.3, 1, 3)
    pixels: NDArray[np.float64] = levels + contrasts * slope + texture
    return pixels.round().clip(0, 255).astype(np.uint8)


def _write_strokes(draw: ImageDraw.ImageDraw, width: int, height: int, random: np.random.Generator) -> None:
    """Three lines of upright and slanted strokes: sharp edges that show a frame shifted by one pixel."""
    size = max(8, height // 12)
    for top in random.integers(0, max(1, height - size), 3):
        ink = tuple(int(level) for level in random.integers(0, 90, 3))
        for left in range(size // 2, width - size, max(5, size // 2)):
            lean = int(random.integers(-size // 4, size // 4 + 1))
            draw.line((left, int(top), left + lean, int(top) + size), fill=ink, width=max(1, size // 8))
