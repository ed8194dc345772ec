"""Second stage of a request: the bytes of an image become upright RGB pixels, within limits checked from the header.

What is read and every conversion is described in `docs/images.md`.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

from app.errors import TooLargeError, UndecodableImageError, UnsupportedMediaError, VitrineError
from app.formats import Format, check_png, count_gif_frames, count_jpeg_scans, count_tiff_pages, has_single_scan, sniff, webp_size

Image.MAX_IMAGE_PIXELS = None  # DecodeLimits rule; Pillow's own limit would warn below them and refuse above it
warnings.filterwarnings("ignore", module=r"PIL\.", category=UserWarning)  # broken metadata must not write to the log
logging.getLogger("PIL").setLevel(logging.CRITICAL)

USUAL_SCANS = 10  # of the progressive JPEGs that encoders write
MAX_READS = 200_000  # calls of Pillow's parsers, which run in Python; a 32 MB PNG in chunks of 1 KB needs 100,000


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused before anything is decoded. `max_pixels` is width x height of one frame.

    A JPEG of `max_scans` may only be so large that its scans together pass over no more than `USUAL_SCANS` x `max_pixels`.
    """

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

    `pixels` is what decoding will hold in memory (after scaled decoding, if any), in pixels of 4 bytes. `size` is the (width,
    height) before scaling and turning. The `orientation` of a PNG is known only when it is decoded; till then it is 1.
    """

    image: ImageFile
    pixels: int
    format: Format
    size: tuple[int, int]
    frames: int
    orientation: int
    scaled: int


MinimumSize = Callable[[int, int], tuple[int, int]]


def open_image(data: bytes, limits: DecodeLimits, minimum_size: MinimumSize | None = None) -> OpenedImage:
    """Read the header.

    `minimum_size(width, height)` of the upright image gives the smallest (width, height) that still serves; when it is given, a
    JPEG may be set to decode at 1/2, 1/4 or 1/8 of its size, never below that minimum.

    Raises:
        MalformedRequestError: no bytes.
        UnsupportedMediaError: not an image type that is read here.
        TooLargeError: more bytes, pixels, a longer side or more progressive scans than the limits.
        UndecodableImageError: a known type with a broken header.
    """
    if len(data) > limits.max_bytes:
        raise TooLargeError(f"The image has {len(data)} bytes; at most {limits.max_bytes} are read.")
    image_format = sniff(data)
    reader = _reader(image_format)
    frames = _check_file(data, image_format, limits)
    with _undecodable(image_format):
        image = reader(_Metered(data))
        size = image.size
        _check_size(size, limits)
        # Asking a PNG would decode it, because its EXIF may follow the pixels.
        orientation = 1 if image_format == "PNG" else _orientation(image)
        buffered = 0  # pixels that libjpeg keeps as coefficients, at full size
        scaled = 1
        if image_format == "JPEG":
            buffered = size[0] * size[1] if _check_scans(image, data, limits) > 1 else 0
            scaled = _scale(image, orientation, minimum_size)
    pixels = image.width * image.height + buffered
    return OpenedImage(image, pixels, image_format, size, frames or getattr(image, "n_frames", 1), orientation, scaled)


def decode(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
    """Decode to an upright RGB Pillow image and say what was done.

    Raises:
        UndecodableImageError: the bytes do not decode (truncated, corrupt).
    """
    image = opened.image
    mode = image.mode
    with _undecodable(opened.format):
        packing = _packing(image)
        image.load()
        orientation = _orientation(image) if opened.format == "PNG" else opened.orientation
        rgb, conversions = _to_rgb(image, packing)
        if opened.format not in _TURNED_BY_PILLOW and orientation != 1:
            rgb = rgb.transpose(_TURNS[orientation])
    if opened.frames > 1:
        conversions.insert(0, f"{'main' if opened.format == 'HEIC' else 'first'} of {opened.frames} frames")
    if orientation != 1:
        conversions.append("turned upright")
    if _has_other_profile(image):
        conversions.append("icc profile ignored")
    width, height = opened.size if opened.format in _TURNED_BY_PILLOW else _upright(opened.size, orientation)
    return rgb, ImageInfo(opened.format, width, height, mode, opened.frames, orientation, tuple(conversions), opened.scaled)


# The readers


class _Metered(BytesIO):
    """The file as Pillow sees it; cut into millions of tiny pieces it would hold the interpreter for many seconds."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise TooLargeError("The file is cut into too many small pieces; save it again.")
        return super().read(size)


_READERS: dict[Format, tuple[str, str]] = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIC": ("pillow_heif", "HeifImageFile"),
}


@cache
def _reader(image_format: Format) -> Callable[[BytesIO], ImageFile]:
    """The class of Pillow that reads one format, imported when the first image of it arrives.

    `Image.open` would import the readers of formats that are not wanted, warn, and give less of a reason when it fails.

    Raises:
        UnsupportedMediaError: the library that reads this format is not installed.
    """
    module_name, class_name = _READERS[image_format]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnsupportedMediaError(
            f"{image_format} is read only where Vitrine is installed with its extra `heic` (pip install 'vitrine[heic]'); "
            "convert the image to JPEG."
        ) from error
    if not getattr(module, "SUPPORTED", True):
        raise UnsupportedMediaError(f"The Pillow installed here was built without {image_format}; convert the image to JPEG.")
    # One thread per image: the pool of decoding threads already fills the cores.
    if image_format == "AVIF":
        module.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]
    elif image_format == "HEIC":
        module.options.DECODE_THREADS = 1
    return getattr(module, class_name)  # type: ignore[no-any-return]


@contextmanager
def _undecodable(image_format: Format) -> Iterator[None]:
    """Translate whatever Pillow raises on broken bytes: more than a dozen types, MemoryError and SyntaxError among them."""
    try:
        yield
    except VitrineError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UndecodableImageError(f"The {image_format} does not decode; it is truncated or corrupt ({reason}).") from error


# The limits


def _check_file(data: bytes, image_format: Format, limits: DecodeLimits) -> int:
    """What must be known before Pillow opens the file. Gives the frames where Pillow would take long to count them, else 0."""
    if image_format == "GIF":
        return count_gif_frames(data)
    if image_format == "TIFF":
        return count_tiff_pages(data)
    if image_format == "PNG":
        check_png(data)
    elif image_format == "WEBP":
        _check_size(webp_size(data), limits)
    return 0


def _check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise TooLargeError(
            f"The image has {width} x {height} = {width * height} pixels; at most {limits.max_pixels} are read. Send a smaller one."
        )
    if max(size) > limits.max_side:
        raise TooLargeError(
            f"The image is {width} x {height}; a side may have at most {limits.max_side} pixels. Send a smaller one."
        )


def _check_scans(image: ImageFile, data: bytes, limits: DecodeLimits) -> int:
    """Scans that libjpeg decodes before it gives the first row; Pillow has read up to the end of the first scan's header."""
    assert image.fp is not None
    position = image.fp.tell()
    if "progressive" not in image.info and has_single_scan(data, position, len(image.getbands())):
        return 1
    scans = count_jpeg_scans(data, position, limits.max_scans)
    if scans > limits.max_scans:
        raise TooLargeError(
            f"The JPEG has more than {limits.max_scans} scans, each of them a pass over the whole image; save it again."
        )
    if scans * image.width * image.height > USUAL_SCANS * limits.max_pixels:
        raise TooLargeError(
            f"The JPEG has {scans} scans, each of them a pass over {image.width} x {image.height} pixels; one of that size is read "
            f"with up to {USUAL_SCANS * limits.max_pixels // (image.width * image.height)}. Save it again."
        )
    return scans


def _scale(image: ImageFile, orientation: int, minimum_size: MinimumSize | None) -> int:
    """Set a JPEG to decode at 1/2, 1/4 or 1/8 when that is still large enough; gives the divisor."""
    if minimum_size is None:
        return 1
    width = image.width
    smallest = _upright(minimum_size(*_upright(image.size, orientation)), orientation)
    drafted = image.draft(None, smallest)
    return 1 if drafted is None else round(width / drafted[1][2])


# The conversions

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED_BY_PILLOW = ("TIFF", "HEIC")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; EXIF that cannot be read, or says anything else, counts as upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) turned as `orientation` says, which is its own inverse."""
    return (size[1], size[0]) if orientation >= 5 else size


def _packing(image: ImageFile) -> str:
    """Pillow's name of the samples in the file (`L;2`, `RGB;16B`): the mode alone does not tell their depth."""
    arguments = image.tile[0].args if image.tile else None
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _to_rgb(image: Image.Image, packing: str) -> tuple[Image.Image, list[str]]:
    """`image` as RGB, and what that took."""
    conversions: list[str] = []
    if ";16" in packing or packing == "I;12":
        conversions.append("16 bit to 8 bit")
    elif image.mode in ("I", "F"):
        conversions.append(f"{'float' if image.mode == 'F' else '32 bit'} to 8 bit")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image, packing)
    elif "transparency" in image.info and packing in _KEY_TO_8_BIT:
        image.info["transparency"] = _KEY_TO_8_BIT[packing](image.info["transparency"])
    if image.mode in _COLOURS:
        conversions.append(f"{_COLOURS[image.mode]} to rgb")
    if image.has_transparency_data:
        return _over_white(image), [*conversions, "alpha over white"]
    return image if image.mode == "RGB" else image.convert("RGB"), conversions


_COLOURS = dict.fromkeys(("1", "L", "LA", "La"), "grey") | dict.fromkeys(("P", "PA"), "palette")
_COLOURS |= {"CMYK": "cmyk", "YCbCr": "ycbcr", "LAB": "lab"}

_KEY_TO_8_BIT: dict[str, Callable[[Any], Any]] = {
    "L;2": lambda key: key * 85,
    "L;4": lambda key: key * 17,
    "RGB;16B": lambda key: tuple(level >> 8 for level in key),
}
"""A transparent colour as PNG stores it, to the 8 bits that Pillow gives the pixels."""


def _over_white(image: Image.Image) -> Image.Image:
    straight = image.convert("LA") if image.mode == "La" else image
    rgba = straight.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


_BAND_PIXELS = 1 << 18


def _to_8_bit(image: Image.Image, packing: str) -> Image.Image:
    """Grey of 16 bits, 32 bits or float to L, or to LA when one level is transparent.

    16 bits keep their high byte, as Pillow does for 16-bit colour. 32 bits and float are read against the smallest usual full scale
    (float only: 1; 255, 65535, 2^32 - 1) that holds the brightest pixel; what is negative or not a number is black.
    """
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        grey = Image.fromarray((levels >> (4 if packing == "I;12" else 8)).astype(np.uint8))
        if "transparency" in image.info:
            opaque = (levels != image.info["transparency"]).astype(np.uint8) * np.uint8(255)
            grey.putalpha(Image.fromarray(opaque))
        return grey
    brightest = max(band.max(where=np.isfinite(band), initial=0) for band in _bands(image))
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    full = next((scale for scale in scales if brightest <= scale), float(2**32 - 1))
    greys = [np.nan_to_num(band.clip(0, full) * (255 / full)).round().astype(np.uint8) for band in _bands(image)]
    return Image.fromarray(np.concatenate(greys))


def _bands(image: Image.Image) -> Iterator[NDArray[np.float32]]:
    """The rows of `image`, some at a time: what is worked out of them takes no memory for all of them at once."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))), np.float32)


def _has_other_profile(image: Image.Image) -> bool:
    """Whether the image carries a colour profile that is not sRGB's."""
    profile = image.info.get("icc_profile")
    return isinstance(profile, bytes) and b"sRGB" not in profile and "sRGB".encode("utf-16-be") not in profile
