"""Small images for the tests: made from a seed, encoded to bytes in any format."""

import struct
import zlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ORIENTATION = 0x0112  # the EXIF tag


def make_image(width: int = 500, height: int = 334, seed: int = 0) -> Image.Image:
    """An RGB image with smooth gradients, a few shapes and mild noise, so that it compresses and resizes like a photo."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    angles, phases = random.uniform(0, 2 * np.pi, (2, 3))
    waves = np.sin(6 * (x[..., None] * np.cos(angles) + y[..., None] * np.sin(angles)) + phases)
    image = Image.fromarray((128 + 90 * waves).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse, draw.rectangle, draw.ellipse):
        left, right = sorted(random.uniform(0, width, 2))
        top, bottom = sorted(random.uniform(0, height, 2))
        shape((left, top, right, bottom), fill=tuple(int(level) for level in random.integers(0, 256, 3)))
    noisy = np.asarray(image) + random.normal(0, 3, (height, width, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002 -- Pillow's word
    """`image` as a file of `format` (Pillow's name: JPEG, PNG, WEBP ...); `options` are those of Pillow's writer."""
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_jpeg(
    width: int = 500,
    height: int = 334,
    seed: int = 0,
    quality: int = 90,
    orientation: int | None = None,
    progressive: bool = False,
) -> bytes:
    """A JPEG of `make_image`; `orientation` (1 to 8) is written to its EXIF, the pixels stay as they are."""
    options = {} if orientation is None else {"exif": make_exif(orientation)}
    return encode(make_image(width, height, seed), "JPEG", quality=quality, progressive=progressive, **options)


def make_png(width: int = 64, height: int = 48, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    """A PNG of `make_image` converted to `mode`."""
    return encode(make_image(width, height, seed).convert(mode), "PNG", **options)


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_raw_png(width: int, height: int, depth: int, colour: int, rows: Iterable[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any sample depth and colour type, which Pillow would not write; `chunks` stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in parts)


def make_tiff(tags: Sequence[tuple[int, int, int, int]], content: bytes, order: str = "<") -> bytes:
    """A TIFF of one page: `tags` are (tag, type, count, value or offset), `content` follows the directory.

    The content begins at byte 14 + 12 x the number of tags.
    """
    entries = b"".join(
        struct.pack(f"{order}HHIHH", *tag, 0) if tag[1] == 3 and tag[2] == 1 else struct.pack(f"{order}HHII", *tag) for tag in tags
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return start + entries + struct.pack(f"{order}I", 0) + content
