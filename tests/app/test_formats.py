"""What the bytes say before a decoder sees them."""

import struct
import time
from collections.abc import Callable
from io import BytesIO

import pytest
from PIL import Image

from app.errors import MalformedRequestError, TooLargeError, UnsupportedMediaError
from app.formats import (
    MAX_PNG_METADATA,
    MAX_STEPS,
    MAX_TIFF_VALUES,
    check_png,
    count_gif_frames,
    count_jpeg_scans,
    count_tiff_pages,
    has_single_scan,
    sniff,
    webp_size,
)
from tests.factories import encode, make_image, make_jpeg, make_png, make_tiff, png_chunk


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_sniffs_what_pillow_writes(name: str) -> None:
    assert sniff(encode(make_image(8, 8), name)) == name


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc"])
def test_sniffs_heic_by_its_brand(brand: bytes) -> None:
    assert sniff(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic") == "HEIC"


@pytest.mark.parametrize(("compatible", "name"), [(b"mif1heic", "HEIC"), (b"mif1avif", "AVIF")])
def test_sniffs_a_general_heif_file_by_its_compatible_brands(compatible: bytes, name: str) -> None:
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0" + compatible) == name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<svg viewBox='0 0 1 1'/>", "an SVG drawing"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><svg>", "an HTML page"),
        (b"<?xml version='1.0'?><rss/>", "an XML document"),
        (b'{"image": 1}', "JSON"),
        (b"data:image/png;base64,iVBORw0KGgo", "a data URL"),
        (b"/9j/4AAQSkZJRg", "base64 text"),
        (b"iVBORw0KGgoAAAA", "base64 text"),
        (b"hello, world", "plain text"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "a video"),
        (b"8BPS\0\x01", "a Photoshop document"),
        (b"\0\x01\x02\x03", "no image format known"),
        (b"\xff", "no image format known"),
        (b"RIFF\0\0\0\0AVI ", "no image format known"),
    ],
)
def test_names_what_is_not_read(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedMediaError, match=message) as caught:
        sniff(data)
    assert "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIC" in caught.value.detail


def test_says_that_there_is_nothing() -> None:
    with pytest.raises(MalformedRequestError, match="empty"):
        sniff(b"")


def first_scan(data: bytes) -> int:
    """The end of the header of a JPEG's first scan."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def test_counts_the_scans_of_a_progressive_jpeg() -> None:
    colour, grey = make_jpeg(64, 64, progressive=True), encode(make_image(64, 64).convert("L"), "JPEG", progressive=True)
    assert count_jpeg_scans(colour, first_scan(colour), 40) == 10
    assert count_jpeg_scans(grey, first_scan(grey), 40) == 6
    assert count_jpeg_scans(colour, first_scan(colour), 4) == 5  # one above the limit is enough to know


def test_scans_are_not_hidden_behind_a_comment_nor_counted_behind_the_end() -> None:
    data = make_jpeg(64, 64, progressive=True)
    second = data.index(b"\xff\xda", first_scan(data))
    hidden = data[:second] + b"\xff\xfe\0\x04\xff\xd9" + data[second:]
    assert count_jpeg_scans(hidden, first_scan(hidden), 40) == 10
    counted = data[:second] + b"\xff\xfe\0\x04\xff\xda" + data[second:]
    assert count_jpeg_scans(counted, first_scan(counted), 40) == 10
    assert count_jpeg_scans(data + data[second:], first_scan(data), 40) == 10


def test_knows_a_jpeg_of_one_scan() -> None:
    data = make_jpeg(16, 16)
    assert has_single_scan(data, first_scan(data), 3)
    assert not has_single_scan(data, first_scan(data), 1)


def test_refuses_a_jpeg_of_endless_segments() -> None:
    data = make_jpeg(16, 16, progressive=True)
    end = first_scan(data)
    with pytest.raises(TooLargeError, match="segments"):
        count_jpeg_scans(data[:end] + b"\xff\xfe\0\x02" * (MAX_STEPS + 1), end, 40)


@pytest.mark.parametrize("kind", [b"iCCP", b"iTXt", b"zTXt"])
def test_refuses_a_png_that_inflates_in_its_metadata(kind: bytes) -> None:
    data = make_png(4, 4)
    header = data[:33]
    check_png(header + png_chunk(kind, b"x") * MAX_PNG_METADATA + data[33:])
    with pytest.raises(TooLargeError, match="metadata"):
        check_png(header + png_chunk(kind, b"x") * (MAX_PNG_METADATA + 1) + data[33:])


def test_refuses_a_png_of_endless_chunks() -> None:
    with pytest.raises(TooLargeError, match="chunks"):
        check_png(make_png(4, 4)[:33] + png_chunk(b"IDAT", b"") * (MAX_STEPS + 1))


def make_gif(frames: int) -> bytes:
    first, *rest = (make_image(16, 16, seed).quantize(8) for seed in range(frames))
    return encode(first, "GIF", save_all=True, append_images=rest, comment=b"made for a test")


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_counts_the_frames_of_a_gif_as_pillow_does(frames: int) -> None:
    data = make_gif(frames)
    with Image.open(BytesIO(data)) as image:
        assert image.n_frames == frames
    assert count_gif_frames(data) == frames


def test_counts_a_broken_gif_as_far_as_it_goes() -> None:
    data = make_gif(3)
    assert [count_gif_frames(data[:end]) for end in (0, 5, 14)] == [1, 1, 1]
    assert count_gif_frames(data[: len(data) * 2 // 3]) in (2, 3)


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("big", [False, True])
def test_counts_the_pages_of_a_tiff(pages: int, big: bool) -> None:
    first, *rest = (make_image(8, 8, seed) for seed in range(pages))
    assert count_tiff_pages(encode(first, "TIFF", save_all=True, append_images=rest, big_tiff=big)) == pages


def test_counts_the_pages_of_a_tiff_that_runs_in_a_circle_or_breaks_off() -> None:
    data = make_tiff([(256, 4, 1, 1)], b"")
    assert count_tiff_pages(data[: 8 + 2 + 12] + struct.pack("<I", 8)) == 1
    assert count_tiff_pages(data[: 8 + 2 + 12] + struct.pack("<I", 10**6)) == 1
    assert [count_tiff_pages(data[:end]) for end in (0, 4, 9)] == [1, 1, 1]
    assert count_tiff_pages(b"II+\0\x08\0\0\0" + b"\xff" * 8) == 1, "behind all files that can be"


def test_refuses_a_tiff_of_endless_strips() -> None:
    count_tiff_pages(make_tiff([(273, 4, MAX_TIFF_VALUES, 8), (700, 1, 10 * MAX_TIFF_VALUES, 8)], b""))
    with pytest.raises(TooLargeError, match="Tag 273"):
        count_tiff_pages(make_tiff([(273, 4, MAX_TIFF_VALUES + 1, 8)], b""))


@pytest.mark.parametrize(
    "options", [{"quality": 80}, {"lossless": True}, {"save_all": True, "append_images": [Image.new("RGB", (301, 97))]}]
)
def test_reads_the_size_of_a_webp(options: dict[str, object]) -> None:
    assert webp_size(encode(make_image(301, 97), "WEBP", **options)) == (301, 97)
    assert webp_size(encode(make_image(301, 97).convert("RGBA"), "WEBP", **options)) == (301, 97)
    assert webp_size(encode(make_image(301, 97), "WEBP")[:24]) == (0, 0)


@pytest.mark.parametrize(
    ("walk", "data"),
    [
        (count_gif_frames, b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe" + b"\1a" * 4_000_000),
        (lambda data: count_jpeg_scans(data, 0, 40), b"\xff\0" * 4_000_000),
        (count_tiff_pages, b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 14 + 6 * i) for i in range(200_000))),
    ],
    ids=["gif", "jpeg", "tiff"],
)
def test_a_hostile_file_is_not_walked_to_its_end(walk: Callable[[bytes], int], data: bytes) -> None:
    started = time.process_time()
    walk(data)
    assert time.process_time() - started < 0.5
