"""Files: valid ones of every format to be broken, and whole ones that are made to cost more than they look."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import pillow_heif
from PIL import Image

from tests.factories import encode, make_exif, make_image, make_jpeg, make_png, make_raw_png, make_tiff, png_chunk

READ, MALFORMED, LARGE, UNKNOWN, BROKEN = 200, 400, 413, 415, 422
ZIP = b"PK\x03\x04" + bytes(26)


@dataclass(frozen=True)
class HostileFile:
    """A file and the statuses with which it may be answered; `pixels` is what decoding it makes."""

    name: str
    data: bytes
    statuses: frozenset[int]
    pixels: int = 0


@cache
def valid() -> dict[str, bytes]:
    """A small file of each format and of each way to write it."""
    image = make_image(96, 64)
    alpha = image.convert("RGBA")
    animated = {"save_all": True, "append_images": [make_image(96, 64, seed) for seed in (1, 2)]}
    tiffs = {
        name: encode(image, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate", "zstd")
    }
    return {
        "jpeg": encode(image, "JPEG"),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg exif icc": encode(image, "JPEG", exif=make_exif(6), icc_profile=b"icc" * 200),
        "mpo": encode(image, "MPO", **animated),
        "png": encode(alpha, "PNG"),
        "png palette": encode(image.quantize(16), "PNG", transparency=3),
        "png 16 bit": encode(image.convert("I;16"), "PNG"),
        "png text": make_png(64, 48)[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(999))) + make_png(64, 48)[33:],
        "apng": encode(image, "PNG", **animated),
        "webp": encode(alpha, "WEBP"),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp animated": encode(image, "WEBP", **animated),
        "gif": encode(image.quantize(64), "GIF", transparency=3),
        "gif animated": encode(image.quantize(64), "GIF", **animated),
        "bmp": encode(image, "BMP"),
        "bmp palette": encode(image.quantize(16), "BMP"),
        "tiff": encode(image, "TIFF"),
        **{f"tiff {name}": data for name, data in tiffs.items()},
        "tiff pages": encode(image, "TIFF", save_all=True, append_images=[image.copy()]),
        "tiff float": encode(image.convert("F"), "TIFF"),
        "tiff big": encode(image, "TIFF", big_tiff=True),
        "avif": encode(alpha, "AVIF", speed=10),
        "avif animated": encode(image, "AVIF", speed=10, **animated),
        "heic": _heic(image),
    }


def hostile(side: int) -> Sequence[HostileFile]:
    """Bombs, oddities and files that are two at once. Those of honest structure have `side` x `side` pixels."""
    return (*_bombs(), *_large(side), *_oddities())


def _file(name: str, data: bytes, *statuses: int, pixels: int = 0) -> HostileFile:
    return HostileFile(name, data, frozenset(statuses), pixels)


def _bombs() -> list[HostileFile]:
    """Small files that announce much, or that are cut into very many pieces."""
    jpeg, png = make_jpeg(8, 8), make_png(8, 8)
    wide = jpeg.replace(b"\xff\xc0\0\x11\x08\0\x08\0\x08", b"\xff\xc0\0\x11\x08\xff\xff\xff\xff")
    gif_head = b"GIF89a\1\0\1\0\0\0\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    strips = [(256, 4, 1, 1), (257, 4, 1, 30_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 2_000_000, 8), (278, 4, 1, 1)]
    page = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (278, 3, 1, 8)]
    pages = b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 14 + 6 * i) for i in range(500_000))
    ring = b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8)
    profile = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000)))
    text = png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000)))
    return [
        _file("png of 60000 x 60000", make_raw_png(60_000, 60_000, 8, 2, [b""]), LARGE),
        _file("png of 300000 chunks", png[:33] + png_chunk(b"IDAT", b"x") * 300_000, LARGE),
        _file("png of 100000 private chunks", png[:33] + png_chunk(b"prVt", b"") * 99_000 + png[33:], READ, LARGE, pixels=64),
        _file("png with 3000 profiles", png[:33] + profile * 3000, LARGE),
        _file("png with a text of 50 MB", png[:33] + text + png[33:], READ, BROKEN, pixels=64),
        _file("apng of 4 billion frames", png[:33] + png_chunk(b"acTL", b"\xff" * 8) + png[33:], READ, BROKEN, pixels=64),
        _file("jpeg of 65535 x 65535", wide, LARGE),
        _file("jpeg with 8 MB of junk", jpeg[:20] + b"\1" * 8_000_000 + jpeg[20:], LARGE, BROKEN),
        _file("jpeg of 100000 segments", jpeg[:2] + b"\xff\xfe\0\2" * 100_000 + jpeg[2:], LARGE),
        _file("jpeg of 60000 comments", jpeg[:2] + b"\xff\xfe\0\2" * 60_000 + jpeg[2:], READ, LARGE, pixels=64),
        _file("jpeg of 8 MB of fill bytes", jpeg[:2] + b"\xff" * 8_000_000 + jpeg[2:], READ, LARGE, BROKEN, pixels=64),
        _file("jpeg with 255 pieces of a profile", jpeg[:2] + _icc_pieces() + jpeg[2:], READ, pixels=64),
        _file("gif of 65535 x 65535", b"GIF89a" + b"\xff" * 4 + b"\0\0\0" + frame + b";", LARGE),
        _file("gif of 100000 frames", gif_head + frame * 100_000 + b";", READ, pixels=1),
        _file("gif with a shredded comment", gif_head + b"\x21\xfe" + b"\1a" * 4_000_000, LARGE, BROKEN),
        _file("gif whose codes never end", gif_head + frame[:10] + b"\x0c" + b"\xff" * 256 * 8000, READ, BROKEN, pixels=1),
        _file(
            "bmp of 60000 x 60000",
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
            LARGE,
        ),
        _file(
            "bmp of negative width",
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, -9, 9, 1, 24, 0, 0, 0, 0, 0, 0),
            LARGE,
            BROKEN,
        ),
        _file("bmp of runs", _run_length_bmp(2000), READ, LARGE, BROKEN, pixels=4_000_000),
        _file("tiff of 2 million strips", make_tiff(strips, bytes(8_000_000)), LARGE),
        _file("tiff of 500000 directories", pages, BROKEN),
        _file("tiff whose directory is its own next", ring, BROKEN),
        _file("tiff of nested directories", _nested_tiff(page, 1000), READ, BROKEN, pixels=64),
        _file("tiff whose exif is itself", make_tiff([*page, (34665, 4, 1, 8)], bytes(64)), READ, BROKEN, pixels=64),
        _file("webp of 16383 x 16383", b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_383).to_bytes(3, "little") * 2, LARGE),
        _file("webp of 16 million a side", b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6, LARGE),
        _file("webp of 20000 frames", _many_frames(valid()["webp animated"], 20_000), READ, LARGE, pixels=6144),
        _file("avif of 4 billion frames", _counting(valid()["avif animated"], 2**32 - 1), READ, LARGE, BROKEN, pixels=6144),
        _file("avif that claims 65535 x 65535", _claiming(valid()["avif"], 65_535), LARGE, BROKEN),
        _file("heic that claims 65535 x 65535", _claiming(valid()["heic"], 65_535), LARGE, BROKEN),
    ]


def _large(side: int) -> list[HostileFile]:
    """Files of as many pixels as are read, in as few bytes as the format allows, some of them broken at their very end."""
    pixels = side * side
    flat = Image.new("RGB", (side, side), "teal")
    small = flat.resize((side // 4, side // 4))
    progressive = encode(flat, "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xc4")
    scan = progressive[last:-2]
    png = encode(flat.convert("RGBA"), "PNG", compress_level=1)
    made = {
        "jpeg": encode(flat, "JPEG"),
        "jpeg of 10 scans": progressive,
        "jpeg of 40 scans": progressive[:-2] + scan * 30 + b"\xff\xd9",
        "png": png,
        "gif": encode(flat.quantize(2), "GIF"),
        "tiff lzw": encode(flat, "TIFF", compression="tiff_lzw"),
        "tiff float": encode(Image.new("F", (side, side), 0.5), "TIFF", compression="tiff_adobe_deflate"),
        "webp lossless": encode(flat, "WEBP", lossless=True, quality=0, method=0),
    }
    many_scans = READ if 40 * pixels <= 640_000_000 else LARGE
    statuses = dict.fromkeys(made, READ) | {"jpeg of 40 scans": many_scans}
    files = [_file(f"{name}, {side} x {side}", data, statuses[name], pixels=pixels) for name, data in made.items()]
    quarter = side // 4  # its encoders take minutes for the largest
    for name, data in {"avif": encode(small, "AVIF", speed=10), "heic": _heic(small)}.items():
        files.append(_file(f"{name}, {quarter} x {quarter}", data, READ, pixels=quarter**2))
        files.append(_file(f"{name} that ends early, {quarter} x {quarter}", data[:-20], LARGE, BROKEN, pixels=quarter**2))
    broken = {
        "jpeg of 200 scans": progressive[:-2] + scan * 190 + b"\xff\xd9",
        "png that ends early": png[: len(png) * 19 // 20],
        "jpeg that ends early": made["jpeg"][: len(made["jpeg"]) * 19 // 20],
        "webp that ends early": made["webp lossless"][:-20],
    }
    refused = (LARGE, BROKEN)
    whole = encode(make_image(side // 4, side // 4), "PNG", compress_level=1)
    end = _file("png with wrong bytes at its end", whole[:-400] + bytes(384) + whole[-16:], READ, BROKEN, pixels=(side // 4) ** 2)
    return [*files, end, *(_file(f"{name}, {side} x {side}", data, *refused, pixels=pixels) for name, data in broken.items())]


def _oddities() -> list[HostileFile]:
    """Nothing, almost nothing, and two files in one."""
    jpeg, gif = make_jpeg(40, 30), encode(make_image(40, 30).quantize(8), "GIF")
    dot = Image.new("RGB", (1, 1), "red")
    dots = {name: encode(dot, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}
    files = [
        _file("no bytes", b"", MALFORMED),
        _file("one byte", b"\xff", UNKNOWN),
        _file("a million zeros", bytes(1_000_000), UNKNOWN),
        _file("1 x 65535", make_raw_png(1, 65_535, 1, 0, [b"\x80"] * 65_535), LARGE),
        _file("65535 x 1", make_raw_png(65_535, 1, 1, 0, [bytes(8192)]), LARGE),
        _file("1 x 32768", make_raw_png(1, 32_768, 1, 0, [b"\x80"] * 32_768), READ, pixels=32_768),
        _file("0 x 0", make_raw_png(0, 0, 8, 2, [b""]), BROKEN),
        _file("html that says it is a gif", b"GIF89a/*<html><script>alert(1)</script>*/", LARGE, BROKEN),
        _file("jpeg and then html", jpeg + b"<html><script>alert(1)</script>", READ, pixels=1200),
        _file("gif and then zip", gif + ZIP, READ, pixels=1200),
        _file("zip", ZIP + jpeg, UNKNOWN),
        _file("pdf around a jpeg", b"%PDF-1.7\n" + jpeg, UNKNOWN),
        _file("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', UNKNOWN),
        _file("svg of entities", b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa">]><svg>&a;</svg>', UNKNOWN),
        _file("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run", UNKNOWN),
        _file("gzip", b"\x1f\x8b\x08" + bytes(100), UNKNOWN),
        _file("png signature with a jpeg", b"\x89PNG\r\n\x1a\n" + jpeg, BROKEN),
    ]
    files += [_file(f"1 x 1 {name}", data, READ, pixels=1) for name, data in dots.items()]
    return files + [_file(f"the first bytes of {name}", data[:12], BROKEN, UNKNOWN, LARGE) for name, data in valid().items()]


def _heic(image: Image.Image) -> bytes:
    buffer = BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=40)
    return buffer.getvalue()


def _claiming(data: bytes, side: int) -> bytes:
    """An ISO media image whose property `ispe` says `side` x `side`."""
    place = data.index(b"ispe") + 8
    return data[:place] + struct.pack(">II", side, side) + data[place + 8 :]


def _counting(data: bytes, frames: int) -> bytes:
    """An ISO media file whose table of sample sizes `stsz` says that there are so many."""
    place = data.index(b"stsz") + 12
    return data[:place] + struct.pack(">I", frames) + data[place + 4 :]


def _many_frames(data: bytes, frames: int) -> bytes:
    """An animated WebP whose last frame comes again and again."""
    last = data.rindex(b"ANMF")
    chunks = data[8:last] + data[last:] * frames
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def _icc_pieces() -> bytes:
    parts = (b"ICC_PROFILE\0" + bytes((number, 255)) + bytes(1000) for number in range(255))
    return b"".join(b"\xff\xe2" + struct.pack(">H", len(part) + 2) + part for part in parts)


def _run_length_bmp(side: int) -> bytes:
    """8 bit, run-length coded (type 1), every pixel a run of its own."""
    runs = (b"\1\5" * side + b"\0\0") * side
    head = struct.pack("<IIIIiiHHIIiiII", 1078 + len(runs), 0, 1078, 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + head + bytes(1024) + runs


def _nested_tiff(page: list[tuple[int, int, int, int]], depth: int) -> bytes:
    """A page whose sub-directory (330) has a sub-directory, and so on."""
    first = 14 + 12 * (len(page) + 1)
    nested = b"".join(struct.pack("<HHHIII", 1, 330, 4, 1, first + 18 * (level + 1), 0) for level in range(depth))
    return make_tiff([*page, (330, 4, 1, first)], nested)
