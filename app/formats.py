"""What the bytes of an image say before a decoder sees them: the format, and what makes decoding cost more than its pixels.

Everything here walks the file in bounded steps, so that no bytes, however hostile, hold the interpreter for long.
"""

import re
import struct
from typing import Literal, get_args

from app.errors import InputError, MalformedRequestError, TooLargeError, UnsupportedMediaError

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"]
READ_HERE = ", ".join(get_args(Format)[:-1]) + f" or {get_args(Format)[-1]}"

MAX_STEPS = 100_000  # segments, blocks, chunks or pages looked at in one file
MAX_PNG_METADATA = 100  # compressed chunks of text or colour profile, each of which may inflate to a megabyte
MAX_TIFF_VALUES = 300_000  # values of one tag; 64 megapixels in tiles of 16 x 16 have 250,000

_SIGNATURES: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_REFUSED = (
    (b"%pdf", "a PDF document"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML document"),
    (b"{", "JSON"),
    (b"data:", "a data URL; send it inside JSON, or its decoded bytes"),
    (b"/9j/", "base64 text; send it inside JSON, or its decoded bytes"),
    (b"ivborw0kggo", "base64 text; send it inside JSON, or its decoded bytes"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjxl ", "JPEG XL"),
    (b"\0\0\0\x0cjp  ", "JPEG 2000"),
    (b"8bps", "a Photoshop document"),
    (b"\0\0\x01\0", "an icon file"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
)


def label(data: bytes) -> str:
    """The format by the first bytes, or `unknown`: for counting what failed."""
    try:
        return sniff(data)
    except InputError:
        return "unknown"


def sniff(data: bytes) -> Format:
    """The format by the first bytes.

    Raises:
        MalformedRequestError: no bytes.
        UnsupportedMediaError: not a format that is read here; the message names what the bytes seem to be.
    """
    if not data:
        raise MalformedRequestError("The image is empty: it has no bytes.")
    for signature, found in _SIGNATURES:
        if data.startswith(signature):
            return found
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        for brand in _brands(data):
            if brand in _AVIF_BRANDS:
                return "AVIF"
            if brand in _HEIC_BRANDS:
                return "HEIC"
    raise UnsupportedMediaError(f"The bytes are {_guess(data)}; send an image as {READ_HERE}.")


def _brands(data: bytes) -> list[bytes]:
    """The major brand of an ISO media file, then the compatible ones."""
    size = min(int.from_bytes(data[:4], "big"), 256, len(data))
    return [data[start : start + 4] for start in (8, *range(16, size - 3, 4))]


def _guess(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "a video or another ISO media file"
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in start:
        return "an SVG drawing"
    for signature, name in _REFUSED:
        if start.startswith(signature):
            return name
    return "plain text" if start.isascii() and b"\0" not in start else "of no image format known here"


# An 0xff that is neither stuffed, a fill byte, nor one of the markers without a length (TEM, RST, SOI).
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_EOI, _SOS = 0xD9, 0xDA


def count_jpeg_scans(data: bytes, position: int, limit: int) -> int:
    """Scans of a JPEG, counted from `position`, the end of the first scan's header; more than `limit` are not counted.

    Only for images that libjpeg reads to the end before it gives the first row: those whose first scan does not hold all of the
    image. Each scan costs a pass over the whole image, and may take only a few bytes.
    """
    scans = 1
    for _ in range(MAX_STEPS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[1][0] == _EOI or scans > limit:
            return scans
        scans += marker[1][0] == _SOS
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    raise TooLargeError(f"The JPEG has more than {MAX_STEPS} segments; save it again.")


def has_single_scan(data: bytes, position: int, components: int) -> bool:
    """Whether the scan whose header ends at `position` holds all `components` of a sequential JPEG."""
    length = 6 + 2 * components
    return data[position - length - 2 : position - length + 3] == bytes((0xFF, _SOS, 0, length, components))


def check_png(data: bytes) -> None:
    """Bound what Pillow inflates apart from the pixels.

    Raises:
        TooLargeError: more chunks or more compressed metadata than any honest file has.
    """
    position = 8
    metadata = 0
    for _ in range(MAX_STEPS):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        metadata += kind in (b"iCCP", b"iTXt", b"zTXt")
        if metadata > MAX_PNG_METADATA:
            raise TooLargeError(f"The PNG has more than {MAX_PNG_METADATA} compressed texts or profiles; save it without metadata.")
        position += 12 + length
    raise TooLargeError(f"The PNG has more than {MAX_STEPS} chunks; save it again.")


def count_gif_frames(data: bytes) -> int:
    """Frames of a GIF; of one with more than `MAX_STEPS` blocks, those among the first."""
    frames = 0
    in_blocks = False
    try:
        position = 13 + _gif_palette(data[10])
        for _ in range(MAX_STEPS):
            kind = data[position]
            if in_blocks:
                in_blocks = kind > 0
                position += 1 + kind
            elif kind == 0x2C:
                frames += 1
                in_blocks = True
                position += 11 + _gif_palette(data[position + 9])
            elif kind == 0x21:
                in_blocks = True
                position += 2
            else:
                break
    except IndexError:
        pass
    return max(1, frames)


def _gif_palette(flags: int) -> int:
    """Bytes of the palette that `flags` announce."""
    return 3 << ((flags & 7) + 1) if flags & 128 else 0


def count_tiff_pages(data: bytes) -> int:
    """Pages of a TIFF.

    Raises:
        TooLargeError: a tag of the first page has more values than any honest file (each is a step for Pillow).
    """
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_format, entry_format, offset_format = (f"{order}{kind}" for kind in (("Q", "HHQQ", "Q") if big else ("H", "HHII", "I")))
    entry_size = struct.calcsize(entry_format)
    seen: set[int] = set()
    try:
        (offset,) = struct.unpack_from(offset_format, data, 8 if big else 4)
        while offset and offset not in seen and len(seen) < MAX_STEPS:
            (entries,) = struct.unpack_from(count_format, data, offset)
            first = offset + struct.calcsize(count_format)
            if not seen:
                _check_tiff_values(data[first : first + entries * entry_size], entry_format)
            seen.add(offset)
            (offset,) = struct.unpack_from(offset_format, data, first + entries * entry_size)
    except (struct.error, OverflowError):  # an offset behind the file, or behind all files
        pass
    return max(1, len(seen))


def _check_tiff_values(entries: bytes, entry_format: str) -> None:
    """Bytes, text and undefined data (types 1, 2 and 7: metadata) cost no step per value."""
    size = struct.calcsize(entry_format)
    for tag, kind, values, _ in struct.iter_unpack(entry_format, entries[: len(entries) // size * size]):
        if values > MAX_TIFF_VALUES and kind not in (1, 2, 7):
            raise TooLargeError(f"Tag {tag} of the TIFF has {values} values; save it in larger strips or tiles.")


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP's canvas, which libwebp allocates as soon as the file is opened; (0, 0) if it is not there."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    bits = int.from_bytes(body[1:5] if kind == b"VP8L" else body[6:10], "little")
    if kind == b"VP8L":
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return bits & 0x3FFF, bits >> 16 & 0x3FFF
