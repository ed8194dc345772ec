"""Second stage of a request: the bytes of an image become upright RGB pixels, within limits checked from the header."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused before anything is decoded. `max_pixels` is width x height of one frame."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_side: int = 32_768
    max_scans: int = 40


@dataclass(frozen=True)
class ImageInfo:
    """What arrived and what was done to it. Sizes are those of the upright original, in pixels."""

    format: str
    width: int
    height: int
    mode: str
    frames: int
    orientation: int
    conversions: tuple[str, ...]
    scaled: int


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header was read and found within the limits; its pixels are not decoded yet.

    `pixels` is what decoding will hold in memory (after scaled decoding, if any).
    """

    image: Image.Image
    pixels: int


MinimumSize = Callable[[int, int], tuple[int, int]]


def open_image(data: bytes, limits: DecodeLimits, minimum_size: MinimumSize | None = None) -> OpenedImage:
    """Read the header.

    `minimum_size(width, height)` of the upright image gives the smallest (width, height) that still serves; when it is given, a
    JPEG may be set to decode at 1/2, 1/4 or 1/8 of its size, never below that minimum.

    Raises:
        UnsupportedMediaError: not an image type that is read here.
        TooLargeError: more bytes, pixels, a longer side or more progressive scans than the limits.
        UndecodableImageError: a known type with a broken header.
    """
    raise NotImplementedError


def decode(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
    """Decode to an upright RGB Pillow image and say what was done.

    Raises:
        UndecodableImageError: the bytes do not decode (truncated, corrupt).
    """
    raise NotImplementedError
