"""Every format, mode and conversion on pixels of a known colour; limits; broken and hostile bytes."""

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from app import decode as decode_module
from app.decode import DecodeLimits, ImageInfo, decode, open_image
from app.errors import InputError, MalformedRequestError, TooLargeError, UndecodableImageError, UnsupportedMediaError
from tests.factories import encode, make_exif, make_image, make_jpeg, make_png, make_raw_png, make_tiff, png_chunk

LIMITS = DecodeLimits()
SIZE = (16, 8)


def read(data: bytes, limits: DecodeLimits = LIMITS) -> tuple[np.ndarray, ImageInfo]:
    image, info = decode(open_image(data, limits))
    assert image.mode == "RGB"
    return np.asarray(image), info


def block(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, SIZE, colour)


def make_heic(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


# Formats and modes


@pytest.mark.parametrize(
    ("image_format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95}, 3),
        ("JPEG", {"quality": 95, "progressive": True}, 3),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 4),
        ("GIF", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
        ("TIFF", {"compression": "packbits"}, 0),
        ("TIFF", {"compression": "jpeg", "quality": 95}, 4),
        ("AVIF", {"quality": 95}, 4),
    ],
)
def test_reads_the_colour_of_every_format(image_format: str, options: dict[str, Any], tolerance: int) -> None:
    pixels, info = read(encode(block("RGB", (200, 100, 50)), image_format, **options))
    np.testing.assert_allclose(pixels.astype(int), np.full((8, 16, 3), (200, 100, 50)), atol=tolerance)
    assert (info.format, info.width, info.height, info.frames, info.orientation, info.scaled) == (image_format, 16, 8, 1, 1, 1)
    assert info.conversions == (() if image_format != "GIF" else ("palette to rgb",))


def test_reads_heic() -> None:
    image = Image.new("RGB", (64, 48), (200, 100, 50))
    pixels, info = read(make_heic(image, quality=95))
    np.testing.assert_allclose(pixels.astype(int), np.full((48, 64, 3), (200, 100, 50)), atol=5)
    assert (info.format, info.width, info.height, info.mode) == ("HEIC", 64, 48, "RGB")


def palette_image() -> Image.Image:
    """Left half index 1 (red), right half index 2 (blue)."""
    image = Image.new("P", SIZE, 1)
    image.putpalette([9, 9, 9, 255, 0, 0, 0, 0, 255])
    image.paste(2, (8, 0, 16, 8))
    return image


CASES = {
    "grey png": (encode(block("L", 77), "PNG"), (77, 77, 77), "L", ["grey to rgb"]),
    "grey jpeg": (encode(block("L", 77), "JPEG"), (77, 77, 77), "L", ["grey to rgb"]),
    "grey webp": (encode(block("L", 77), "WEBP", lossless=True), (77, 77, 77), "RGB", []),
    "grey bmp": (encode(block("L", 77), "BMP"), (77, 77, 77), "L", ["grey to rgb"]),
    "1 bit white png": (encode(block("1", 1), "PNG"), (255, 255, 255), "1", ["grey to rgb"]),
    "1 bit black png": (encode(block("1", 0), "PNG"), (0, 0, 0), "1", ["grey to rgb"]),
    "1 bit white tiff": (encode(block("1", 1), "TIFF"), (255, 255, 255), "1", ["grey to rgb"]),
    "1 bit fax tiff": (encode(block("1", 1), "TIFF", compression="group4"), (255, 255, 255), "1", ["grey to rgb"]),
    "1 bit bmp": (encode(block("1", 1), "BMP"), (255, 255, 255), "1", ["grey to rgb"]),
    "rgba png": (encode(block("RGBA", (255, 0, 0, 128)), "PNG"), (255, 127, 127), "RGBA", ["alpha over white"]),
    "clear png": (encode(block("RGBA", (255, 0, 0, 0)), "PNG"), (255, 255, 255), "RGBA", ["alpha over white"]),
    "opaque png": (encode(block("RGBA", (255, 0, 0, 255)), "PNG"), (255, 0, 0), "RGBA", ["alpha over white"]),
    "rgba webp": (encode(block("RGBA", (255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127), "RGBA", ["alpha over white"]),
    "rgba tiff": (encode(block("RGBA", (255, 0, 0, 128)), "TIFF"), (255, 127, 127), "RGBA", ["alpha over white"]),
    "rgba avif": (encode(block("RGBA", (255, 0, 0, 128)), "AVIF", quality=100), (255, 127, 127), "RGBA", ["alpha over white"]),
    "grey alpha png": (encode(block("LA", (0, 128)), "PNG"), (127, 127, 127), "LA", ["grey to rgb", "alpha over white"]),
    "cmyk tiff": (encode(block("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), "CMYK", ["cmyk to rgb"]),
    "cmyk jpeg": (encode(block("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0), "CMYK", ["cmyk to rgb"]),
    "cmyk jpeg, black ink": (encode(block("CMYK", (0, 0, 0, 55)), "JPEG", quality=95), (200, 200, 200), "CMYK", ["cmyk to rgb"]),
    "ycbcr tiff": (encode(block("YCbCr", (76, 85, 255)), "TIFF"), (254, 0, 0), "YCbCr", ["ycbcr to rgb"]),
    "lab tiff": (encode(block("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255), "LAB", ["lab to rgb"]),
}


@pytest.mark.parametrize(("data", "colour", "mode", "conversions"), CASES.values(), ids=CASES)
def test_converts_every_mode(data: bytes, colour: tuple[int, int, int], mode: str, conversions: list[str]) -> None:
    pixels, info = read(data)
    tolerance = 3 if info.format in ("JPEG", "AVIF") or mode in ("YCbCr", "LAB") else 0
    np.testing.assert_allclose(pixels.astype(int), np.full((8, 16, 3), colour), atol=tolerance)
    assert info.mode == mode
    assert list(info.conversions) == conversions


def test_reads_the_inks_of_a_ycck_jpeg() -> None:
    """Pillow writes no YCCK: the stored channels are those of red, inverted as Adobe does, and the marker is made to say so."""
    inverted_cmy_as_ycc = (179, 171, 1)  # of RGB (0, 255, 255)
    image = Image.new("CMYK", (16, 16), (*(255 - level for level in inverted_cmy_as_ycc), 0))
    data = bytearray(encode(image, "JPEG", quality=100))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    pixels, info = read(bytes(data))
    np.testing.assert_allclose(pixels.astype(int), np.full((16, 16, 3), (255, 0, 0)), atol=3)
    assert info.conversions == ("cmyk to rgb",)


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_looks_colours_up_in_the_palette(image_format: str) -> None:
    pixels, info = read(encode(palette_image(), image_format))
    assert (pixels[:, :8] == (255, 0, 0)).all()
    assert (pixels[:, 8:] == (0, 0, 255)).all()
    assert (info.mode, info.conversions) == ("P", ("palette to rgb",))


@pytest.mark.parametrize(
    ("image_format", "transparency", "right"),
    [("PNG", 2, (255, 255, 255)), ("PNG", b"\xff\xff\x80", (127, 127, 255)), ("GIF", 2, (255, 255, 255))],
)
def test_a_transparent_entry_of_the_palette_shows_white(image_format: str, transparency: object, right: tuple[int, ...]) -> None:
    pixels, info = read(encode(palette_image(), image_format, transparency=transparency))
    assert (pixels[:, :8] == (255, 0, 0)).all()
    assert (pixels[:, 8:] == right).all()
    assert info.conversions == ("palette to rgb", "alpha over white")


TWO_BIT, FOUR_BIT = [bytes([0b00_01_10_11])], [bytes([0x0F])]
GREY_16, RGB_16 = [struct.pack(">2H", 0x1234, 0xFFFF)], [struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x8000)]
DEEP = "16 bit to 8 bit"
RAW_PNGS = {
    "2 bit": (make_raw_png(4, 1, 2, 0, TWO_BIT), [(0,) * 3, (85,) * 3, (170,) * 3, (255,) * 3], []),
    "2 bit, white clear": (
        make_raw_png(4, 1, 2, 0, TWO_BIT, (b"tRNS", b"\0\0")),
        [(255,) * 3, (85,) * 3, (170,) * 3, (255,) * 3],
        [],
    ),
    "2 bit, 1 clear": (make_raw_png(4, 1, 2, 0, TWO_BIT, (b"tRNS", b"\0\1")), [(0,) * 3, (255,) * 3, (170,) * 3, (255,) * 3], []),
    "4 bit, black clear": (make_raw_png(2, 1, 4, 0, FOUR_BIT, (b"tRNS", b"\0\0")), [(255,) * 3, (255,) * 3], []),
    "4 bit, 3 clear": (make_raw_png(2, 1, 4, 0, [b"\x35"], (b"tRNS", b"\0\3")), [(255,) * 3, (85,) * 3], []),
    "8 bit, key": (make_raw_png(2, 1, 8, 0, [b"\x0a\x0b"], (b"tRNS", b"\0\x0a")), [(255,) * 3, (11,) * 3], []),
    "rgb, key": (make_raw_png(2, 1, 8, 2, [b"\1\2\3\4\5\6"], (b"tRNS", b"\0\1\0\2\0\3")), [(255,) * 3, (4, 5, 6)], []),
    "16 bit": (make_raw_png(2, 1, 16, 0, GREY_16), [(0x12,) * 3, (255,) * 3], [DEEP]),
    "16 bit, key": (make_raw_png(2, 1, 16, 0, GREY_16, (b"tRNS", b"\x12\x34")), [(255,) * 3, (255,) * 3], [DEEP]),
    "16 bit, no key": (make_raw_png(2, 1, 16, 0, GREY_16, (b"tRNS", b"\x12\x35")), [(0x12,) * 3, (255,) * 3], [DEEP]),
    "16 bit rgb": (make_raw_png(2, 1, 16, 2, RGB_16), [(0x12, 0x56, 0x9A), (255, 0, 128)], [DEEP]),
    "16 bit rgb, key": (
        make_raw_png(2, 1, 16, 2, RGB_16, (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))),
        [(255,) * 3, (255, 0, 128)],
        [DEEP],
    ),
    "16 bit grey alpha": (
        make_raw_png(2, 1, 16, 4, [struct.pack(">4H", 0, 0x8000, 0x8000, 0xFFFF)]),
        [(127,) * 3, (128,) * 3],
        [DEEP],
    ),
    "16 bit rgba": (make_raw_png(1, 1, 16, 6, [struct.pack(">4H", 0xFFFF, 0, 0, 0x8000)]), [(255, 127, 127)], [DEEP]),
}


@pytest.mark.parametrize(("data", "row", "conversions"), RAW_PNGS.values(), ids=RAW_PNGS)
def test_reads_every_depth_of_png(data: bytes, row: list[tuple[int, int, int]], conversions: list[str]) -> None:
    pixels, info = read(data)
    np.testing.assert_array_equal(pixels, [row])
    assert [name for name in info.conversions if name == DEEP] == conversions


def grey_tiff(samples: bytes, width: int, bits: int, sample_format: int = 1, order: str = "<") -> bytes:
    tags = [(256, 3, 1, width), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 14 + 12 * 9), (277, 3, 1, 1), (279, 4, 1, len(samples)), (339, 3, 1, sample_format)]
    return make_tiff(tags, samples, order)


DEEP_TIFFS = {
    "16 bit": (grey_tiff(struct.pack("<3H", 0, 0x8000, 0xFFFF), 3, 16), [0, 128, 255], DEEP),
    "16 bit, big endian": (grey_tiff(struct.pack(">3H", 0, 0x8000, 0xFFFF), 3, 16, order=">"), [0, 128, 255], DEEP),
    "12 bit": (grey_tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), 4, 12), [0, 128, 255, 0], DEEP),
    "32 bit of 8": (grey_tiff(struct.pack("<3i", -5, 100, 255), 3, 32, 2), [0, 100, 255], "32 bit to 8 bit"),
    "32 bit of 16": (grey_tiff(struct.pack("<3i", 0, 257 * 100, 65535), 3, 32, 2), [0, 100, 255], "32 bit to 8 bit"),
    "32 bit": (grey_tiff(struct.pack("<2i", 0, 2**31 - 1), 2, 32, 2), [0, 128], "32 bit to 8 bit"),
    "float to 1": (grey_tiff(struct.pack("<4f", -1, 0, 0.5, 1), 4, 32, 3), [0, 0, 128, 255], "float to 8 bit"),
    "float to 255": (grey_tiff(struct.pack("<3f", 0, 99.6, 255), 3, 32, 3), [0, 100, 255], "float to 8 bit"),
    "float to 65535": (grey_tiff(struct.pack("<2f", 257 * 100, 65535), 2, 32, 3), [100, 255], "float to 8 bit"),
    "float, not finite": (
        grey_tiff(struct.pack("<5f", float("nan"), float("inf"), float("-inf"), 0.2, 1), 5, 32, 3),
        [0, 255, 0, 51, 255],
        "float to 8 bit",
    ),
    "float, huge": (grey_tiff(struct.pack("<3f", -3e38, 0, 3e38), 3, 32, 3), [0, 0, 255], "float to 8 bit"),
}


@pytest.mark.parametrize(("data", "levels", "conversion"), DEEP_TIFFS.values(), ids=DEEP_TIFFS)
def test_reads_deep_grey(data: bytes, levels: list[int], conversion: str) -> None:
    pixels, info = read(data)
    np.testing.assert_array_equal(pixels[0], np.repeat(levels, 3).reshape(-1, 3))
    assert info.conversions == (conversion, "grey to rgb")


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_a_large_deep_image_has_one_scale(kind: str) -> None:
    """It is worked on by bands of rows; its brightest pixel lies in the last."""
    values = np.linspace(-5, 200, 700 * 900).reshape(700, 900).astype(kind)
    values[-1] = 60000
    pixels, _ = read(encode(Image.fromarray(values), "TIFF"))
    expected = (values.clip(0) * (255 / 65535)).round().astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))


def test_reads_16_bit_colour_tiff() -> None:
    samples = struct.pack("<6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x8000)
    at = 14 + 12 * 9
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, at + 6), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12)]
    pixels, info = read(make_tiff(tags, struct.pack("<3H", 16, 16, 16) + samples))
    np.testing.assert_array_equal(pixels, [[(0x12, 0x56, 0x9A), (255, 0, 128)]])
    assert info.conversions == (DEEP,)


@pytest.mark.parametrize(
    ("photometric", "extra", "samples", "mode", "colour"),
    [
        (1, 2, bytes([0, 128]), "LA", (127, 127, 127)),
        (1, 1, bytes([64, 128]), "La", (191, 191, 191)),  # premultiplied: 64 stands for 127 at half alpha
        (3, 2, bytes([1, 128]), "PA", (255, 127, 127)),
    ],
)
def test_reads_two_channel_tiff(photometric: int, extra: int, samples: bytes, mode: str, colour: tuple[int, ...]) -> None:
    at = 14 + 12 * 11
    colours = b"".join(struct.pack("<256H", *levels) for levels in ([0, 0xFFFF] + [0] * 254, [0] * 256, [0] * 256))
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 2, 8 | 8 << 16), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [(273, 4, 1, at), (277, 3, 1, 2), (278, 3, 1, 1), (279, 4, 1, 2), (320, 3, 768, at + 2), (338, 3, 1, extra)]
    pixels, info = read(make_tiff(tags, samples + colours))
    np.testing.assert_allclose(pixels[0, 0].astype(int), colour, atol=1)
    assert info.mode == mode
    assert info.conversions[-1] == "alpha over white"


# Colour profiles: ignored, as where the models were trained


def swapped_srgb() -> bytes:
    """A profile that takes red for blue, and is not named sRGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("TIFF", {}), ("AVIF", {"quality": 100})]
)
def test_a_colour_profile_does_not_change_the_pixels(image_format: str, options: dict[str, Any]) -> None:
    red, profile = block("RGB", (200, 0, 0)), swapped_srgb()
    managed = ImageCms.profileToProfile(red, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"))
    assert managed.getpixel((0, 0))[2] > 150, "the profile of the test must matter to software that follows it"
    pixels, info = read(encode(red, image_format, icc_profile=profile, **options))
    np.testing.assert_array_equal(pixels, read(encode(red, image_format, **options))[0])
    assert info.conversions == ("icc profile ignored",)


def test_an_srgb_profile_is_not_worth_a_word() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read(encode(block("RGB", 0), "PNG", icc_profile=profile))[1].conversions == ()


# Orientation

CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24], CORNERS[16:, 24:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)
STORED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: np.rot90(CORNERS, 1),  # shown by turning it 90 degrees clockwise
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(CORNERS, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    ],
)
def test_turns_the_image_upright(image_format: str, options: dict[str, Any], orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    pixels, info = read(encode(stored, image_format, exif=make_exif(orientation), **options))
    np.testing.assert_allclose(pixels.astype(int), CORNERS, atol=12 if image_format in ("JPEG", "AVIF") else 0)
    assert (info.width, info.height, info.orientation) == (48, 32, orientation)
    assert info.conversions == (() if orientation == 1 else ("turned upright",))


def test_turns_a_heic_upright() -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[6]))
    pixels, info = read(make_heic(stored, quality=95, exif=make_exif(6).tobytes()))
    assert (info.width, info.height) == (48, 32)
    assert np.abs(pixels.astype(int) - CORNERS).mean() < 8


def test_turns_a_png_whose_exif_follows_the_pixels() -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[6]))
    data = encode(stored, "PNG")
    late = data[:-12] + png_chunk(b"eXIf", make_exif(6).tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    pixels, info = read(late)
    np.testing.assert_array_equal(pixels, CORNERS)
    assert (info.width, info.height, info.orientation) == (48, 32, 6)


@pytest.mark.parametrize("value", [0, 9, 4000])
def test_an_orientation_that_does_not_exist_is_upright(value: int) -> None:
    assert read(make_jpeg(20, 10, orientation=value))[1].orientation == 1


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\xff"]
)
def test_broken_exif_does_not_spoil_the_image(exif: bytes) -> None:
    for image_format in ("JPEG", "PNG", "WEBP"):
        _, info = read(encode(make_image(20, 10), image_format, exif=exif))
        assert (info.width, info.height, info.orientation) == (20, 10, 1)


# Frames


@pytest.mark.parametrize(
    ("image_format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {"quality": 95})]
)
def test_reads_the_first_frame(image_format: str, options: dict[str, Any]) -> None:
    first, second, third = (block("RGB", colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    pixels, info = read(encode(first, image_format, save_all=True, append_images=[second, third], **options))
    np.testing.assert_allclose(pixels.astype(int), np.full((8, 16, 3), (200, 0, 0)), atol=6)
    assert info.frames == 3
    assert info.conversions[0] == "first of 3 frames"


def test_reads_the_main_image_of_a_heic() -> None:
    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 0, 0)))
    heif.add_from_pillow(Image.new("RGB", (64, 64), (0, 0, 200)))
    buffer = io.BytesIO()
    heif.save(buffer, primary_index=1)
    pixels, info = read(buffer.getvalue())
    assert pixels[..., 2].mean() > 180
    assert info.conversions == ("main of 2 frames",)


# Scaled decoding


def at_least(width: int, height: int, smallest: tuple[int, int]) -> tuple[int, int]:
    """A minimum size that also records what it was asked for."""
    assert (width, height) == (1000, 600)
    return smallest


@pytest.mark.parametrize(
    ("smallest", "scaled", "size"),
    [
        ((1000, 600), 1, (1000, 600)),
        ((501, 300), 1, (1000, 600)),
        ((500, 300), 2, (500, 300)),
        ((250, 150), 4, (250, 150)),
        ((126, 75), 4, (250, 150)),
        ((125, 75), 8, (125, 75)),
        ((1, 1), 8, (125, 75)),
        ((2000, 3), 1, (1000, 600)),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
def test_scales_a_jpeg_while_decoding(
    smallest: tuple[int, int], scaled: int, size: tuple[int, int], orientation: int, progressive: bool
) -> None:
    stored = (1000, 600) if orientation == 1 else (600, 1000)
    opened = open_image(
        make_jpeg(*stored, orientation=orientation, progressive=progressive), LIMITS, partial(at_least, smallest=smallest)
    )
    image, info = decode(opened)
    assert (image.size, info.scaled, info.width, info.height) == (size, scaled, 1000, 600)
    assert opened.pixels == size[0] * size[1] + (600_000 if progressive else 0)


@pytest.mark.parametrize("seed", range(20))
def test_scaled_decoding_never_goes_below_the_minimum(seed: int) -> None:
    width, height, *smallest = (int(side) for side in np.random.default_rng(seed).integers(1, 400, 4))
    opened = open_image(make_jpeg(width, height, seed), LIMITS, lambda *_: (smallest[0], smallest[1]))
    image, info = decode(opened)
    assert (info.width, info.height) == (width, height)
    assert image.size == (-(-width // info.scaled), -(-height // info.scaled))
    assert info.scaled == 1 or all(kept >= least for kept, least in zip(image.size, smallest, strict=True))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scaled_decoding_keeps_the_colours(mode: str) -> None:
    data = encode(make_image(400, 240).convert(mode), "JPEG", quality=95)
    opened = open_image(data, LIMITS, lambda *_: (100, 60))
    small, info = decode(opened)
    assert (info.mode, info.scaled, small.size) == (mode, 4, (100, 60))
    full = Image.fromarray(read(data)[0]).reduce(4)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(full)).mean() < 3


def test_other_formats_are_not_scaled() -> None:
    image, info = decode(open_image(make_png(400, 240), LIMITS, lambda *_: (10, 10)))
    assert (image.size, info.scaled) == ((400, 240), 1)


# Limits


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when pixels are decoded."""
    decoded: list[object] = []

    def record(image: object) -> None:
        decoded.append(image)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", record)
    yield
    assert not decoded


ALL = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")


def make_any(image_format: str, image: Image.Image) -> bytes:
    return make_heic(image) if image_format == "HEIC" else encode(image, image_format)


@pytest.mark.parametrize("image_format", ALL)
def test_limits_hold_before_decoding(image_format: str, request: pytest.FixtureRequest) -> None:
    data = make_any(image_format, make_image(200, 100))
    request.getfixturevalue("undecoded")
    assert open_image(data, DecodeLimits(len(data), 20_000, 200)).pixels == 20_000
    with pytest.raises(TooLargeError, match=f"{len(data)} bytes"):
        open_image(data, DecodeLimits(max_bytes=len(data) - 1))
    with pytest.raises(TooLargeError, match="200 x 100 = 20000 pixels; at most 19999"):
        open_image(data, DecodeLimits(max_pixels=19_999))
    with pytest.raises(TooLargeError, match="a side may have at most 199"):
        open_image(data, DecodeLimits(max_side=199))


@pytest.mark.parametrize(
    "data",
    [
        make_raw_png(60_000, 60_000, 8, 2, [b""]),
        b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x00;",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (65_000).to_bytes(3, "little") * 2,
        make_jpeg(8, 8).replace(b"\xff\xc0\0\x11\x08\0\x08\0\x08", b"\xff\xc0\0\x11\x08\xff\xff\xff\xff"),
    ],
    ids=["png", "gif", "bmp", "webp", "jpeg"],
)
def test_a_small_file_that_claims_a_vast_image_is_refused_by_our_limit(data: bytes, undecoded: None) -> None:
    with pytest.raises(TooLargeError, match="at most 64000000 are read"):
        open_image(data, LIMITS)


def test_pillows_own_limit_does_not_speak() -> None:
    """89 million pixels warn in Pillow, twice as many fail; warnings are errors here."""
    limits = DecodeLimits(max_pixels=10**9, max_side=10**5)
    for side in (10_000, 20_000):
        gif = b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x00;"
        assert open_image(gif, limits).pixels == side * side


def test_too_many_scans_are_refused_before_decoding(undecoded: None) -> None:
    data = make_jpeg(64, 64, progressive=True)
    assert open_image(data, DecodeLimits(max_scans=10)).pixels == 2 * 64 * 64
    with pytest.raises(TooLargeError, match="more than 9 scans"):
        open_image(data, DecodeLimits(max_scans=9))
    last = data.rindex(b"\xff\xc4")
    with pytest.raises(TooLargeError, match="more than 40 scans"):
        open_image(data[:-2] + data[last:-2] * 200 + data[-2:], LIMITS)


def test_scans_times_pixels_are_bounded(undecoded: None) -> None:
    """40 scans of the largest image would take four times as long as those that encoders write."""
    usual = make_jpeg(64, 64, progressive=True)
    last = usual.rindex(b"\xff\xc4")
    many = usual[:-2] + usual[last:-2] * 10 + usual[-2:]
    assert open_image(usual, DecodeLimits(max_pixels=64 * 64)).size == (64, 64)
    assert open_image(many, DecodeLimits(max_pixels=2 * 64 * 64)).size == (64, 64)
    with pytest.raises(TooLargeError, match=r"has 20 scans, .* 64 x 64 pixels; one of that size is read with up to 19"):
        open_image(many, DecodeLimits(max_pixels=2 * 64 * 64 - 1))


def make_separate_scans(repeated: int = 1) -> bytes:
    """A red sequential JPEG, YCbCr (76, 85, 255), with a scan for each component; the first comes `repeated` times."""
    greys = [encode(Image.new("L", (16, 16), level), "JPEG", quality=95) for level in (76, 85, 255)]
    frame, scan = greys[0].index(b"\xff\xc0"), greys[0].index(b"\xff\xda")
    tables = greys[0].index(b"\xff\xc4")
    header = greys[0][:frame] + b"\xff\xc0\0\x11\x08\0\x10\0\x10\x03" + b"".join(bytes([n, 0x11, 0]) for n in (1, 2, 3))
    scans = [b"\xff\xda\0\x08\x01" + bytes([n]) + b"\0\0\x3f\0" + grey[scan + 10 : -2] for n, grey in enumerate(greys, 1)]
    return header + greys[0][tables:scan] + scans[0] * repeated + scans[1] + scans[2] + b"\xff\xd9"


def test_scans_of_a_sequential_jpeg_count_too(undecoded: None) -> None:
    assert open_image(make_separate_scans(), LIMITS).pixels == 2 * 16 * 16
    with pytest.raises(TooLargeError, match="more than 40 scans"):
        open_image(make_separate_scans(100), LIMITS)


def test_reads_a_jpeg_of_separate_scans() -> None:
    np.testing.assert_allclose(read(make_separate_scans())[0].astype(int), np.full((16, 16, 3), (254, 0, 0)), atol=3)


HOSTILE = {
    "jpeg with junk": make_jpeg(8, 8)[:20] + b"\1" * 8_000_000 + make_jpeg(8, 8)[20:],
    "gif with a shredded comment": b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe" + b"\1a" * 4_000_000,
    "png with shredded pixels": make_png(8, 8)[:33] + png_chunk(b"IDAT", b"x") * 300_000,
    "png with inflating profiles": make_png(8, 8)[:33] + png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 3000,
    "tiff with endless strips": make_tiff(
        [(256, 4, 1, 1), (257, 4, 1, 30_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 2_000_000, 8), (278, 4, 1, 1)],
        bytes(8_000_000),
    ),
    "tiff with many pages": b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 14 + 6 * i) for i in range(500_000)),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_quickly(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises((TooLargeError, UndecodableImageError)):
        decode(open_image(data, LIMITS))
    assert time.process_time() - started < 1


# Broken bytes


def test_refuses_what_is_no_image() -> None:
    with pytest.raises(MalformedRequestError, match="empty"):
        open_image(b"", LIMITS)
    with pytest.raises(UnsupportedMediaError, match="PDF"):
        open_image(b"%PDF-1.7", LIMITS)


def test_says_how_to_read_heic_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_heic(make_image(64, 64))
    decode_module._reader.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnsupportedMediaError, match=r"its extra `heic`"):
        open_image(data, LIMITS)
    monkeypatch.undo()
    assert open_image(data, LIMITS).format == "HEIC"


def variants() -> dict[str, bytes]:
    image, alpha = make_image(96, 64), make_image(96, 64).convert("RGBA")
    return {
        "jpeg": encode(image, "JPEG"),
        "progressive": encode(image, "JPEG", progressive=True),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "exif": encode(image, "JPEG", exif=make_exif(6)),
        "png": encode(alpha, "PNG"),
        "palette": encode(image.quantize(16), "PNG", transparency=3),
        "animated png": encode(image, "PNG", save_all=True, append_images=[make_image(96, 64, 1)]),
        "webp": encode(alpha, "WEBP"),
        "lossless": encode(image, "WEBP", lossless=True),
        "gif": encode(image.quantize(64), "GIF", transparency=3),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
        "lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(image, "TIFF", compression="jpeg"),
        "float": encode(image.convert("F"), "TIFF"),
        "avif": encode(alpha, "AVIF", speed=10),
        "heic": make_heic(image),
    }


VARIANTS = variants()


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"animated png"}))  # its first frame is whole long before its end
def test_a_truncated_file_does_not_decode(name: str) -> None:
    data = VARIANTS[name]
    for twentieths in range(1, 20):
        with pytest.raises((UndecodableImageError, UnsupportedMediaError)):
            decode(open_image(data[: len(data) * twentieths // 20], LIMITS))


def flips(data: bytes, seed: int, rounds: int) -> Iterator[bytes]:
    """`data` with 1 to 8 bytes changed, half of them among the first 200, where the headers are."""
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        broken = bytearray(data)
        for _ in range(random.integers(1, 9)):
            broken[random.integers(min(200, len(data)) if random.random() < 0.5 else len(data))] = random.integers(256)
        yield bytes(broken)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("data", VARIANTS.values(), ids=VARIANTS)
def test_a_corrupt_file_raises_an_input_error_or_decodes(data: bytes) -> None:
    started = time.process_time()
    limits = DecodeLimits(max_pixels=1_000_000)
    for broken in flips(data, 0, 60):
        try:
            image, info = decode(open_image(broken, limits, lambda *_: (24, 16)))
        except InputError:
            continue
        assert image.mode == "RGB"
        assert image.size == (-(-info.width // info.scaled), -(-info.height // info.scaled))
    assert time.process_time() - started < 20


@pytest.mark.parametrize("error", [MemoryError(), SyntaxError("x"), struct.error("x"), OverflowError("x"), EOFError(), KeyError(1)])
def test_whatever_pillow_raises_is_translated(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    opened = open_image(make_jpeg(8, 8), LIMITS)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UndecodableImageError) as caught:
        decode(opened)
    assert caught.value.__cause__ is error


def test_imports_only_the_readers_it_needs() -> None:
    script = (
        "import sys; from app.decode import *;"
        "decode(open_image(sys.stdin.buffer.read(), DecodeLimits()));"
        "print(*[name for name in sys.modules if name.startswith('PIL.') and name.endswith('Plugin') or name == 'pillow_heif'])"
    )
    done = subprocess.run([sys.executable, "-c", script], input=encode(make_image(8, 8), "WEBP"), capture_output=True, check=True)
    assert done.stdout.decode().split() == ["PIL.WebPImagePlugin"]
