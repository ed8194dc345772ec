"""What image codecs do with the same images at the same rates, and the pictures that show it beside a tokenizer.

Rates are bits per pixel of the whole file, and of the coded data alone: what a codec would send if the other side had the container
and the headers already, as a tokenizer's other side has its codebook.
"""

import bisect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from app.fidelity import psnr

Pixels = NDArray[np.uint8]


def jpeg_scan(data: bytes) -> int:
    """Bytes of a baseline JPEG behind its last header (that of the scan), the end marker included."""
    scan = data.index(b"\xff\xda")
    return len(data) - scan - 2 - int.from_bytes(data[scan + 2 : scan + 4], "big")


def webp_frame(data: bytes) -> int:
    """Bytes of the frame in a simple lossy WebP, without the chunks around it."""
    frame = data.index(b"VP8 ")
    return int.from_bytes(data[frame + 4 : frame + 8], "little")


def avif_media(data: bytes) -> int:
    """Bytes of the `mdat` boxes of an AVIF: the AV1 stream without the boxes that describe it."""
    position = total = 0
    while position < len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        size = size or len(data) - position
        total += size - 8 if kind == b"mdat" else 0
        position += size
    return total


@dataclass(frozen=True)
class Codec:
    """`qualities` begin with its lowest; `coded` counts the bytes of a file that are the image's own; `options` are Pillow's."""

    name: str
    format: str
    qualities: Sequence[int]
    coded: Callable[[bytes], int]
    options: Mapping[str, Any]
    colour: str

    def encode(self, image: Image.Image, quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, self.format, quality=quality, **self.options)
        return file.getvalue()


CODECS = (
    Codec("JPEG", "JPEG", range(1, 40, 2), jpeg_scan, {"optimize": True}, "#c0504d"),
    Codec("WebP", "WEBP", (0, 1, 2, *range(4, 40, 4)), webp_frame, {"method": 6}, "#4f81bd"),
    Codec("AVIF", "AVIF", range(0, 56, 6), avif_media, {"speed": 6}, "#6a9a3a"),
)


@dataclass(frozen=True)
class Point:
    """Means over the images: bits per pixel of the file, and of the coded data, and dB."""

    rate: float
    coded_rate: float
    psnr: float


def encode_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def decoded(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def curve(codec: Codec, images: Sequence[Image.Image]) -> list[Point]:
    """A point for each of the codec's qualities, the lowest first."""
    points = []
    for quality in codec.qualities:
        files = [codec.encode(image, quality) for image in images]
        pixels = sum(image.width * image.height for image in images)
        ratios = [psnr(decoded(file), np.asarray(image)) for file, image in zip(files, images, strict=True)]
        rates = [8 * sum(map(count, files)) / pixels for count in (len, codec.coded)]
        points.append(Point(*rates, float(np.mean(ratios))))
    return points


def at_rate(points: Sequence[Point], rate: float, of: Literal["rate", "coded_rate"] = "rate") -> float:
    """The PSNR of a curve at a rate, between its points; NaN where the curve does not go."""
    rates, levels = [getattr(each, of) for each in points], [each.psnr for each in points]
    return float(np.interp(rate, rates, levels, left=np.nan, right=np.nan))


def nearest_file(codec: Codec, image: Image.Image, size: int) -> bytes:
    """The file whose size in bytes is nearest to `size`, of all qualities; a higher one is taken to be no smaller."""
    qualities = range(codec.qualities[0], 96)
    above = bisect.bisect_left(qualities, size, key=lambda quality: len(codec.encode(image, quality)))
    files = [codec.encode(image, quality) for quality in qualities[max(0, above - 1) : above + 1]]
    return min(files, key=lambda file: abs(len(file) - size))


def plot(panels: Mapping[str, tuple[Mapping[str, Sequence[Point]], Point]], name: str, file: Path) -> None:
    """A panel of curves for each way of cutting, by its title, with the point of the tokenizer `name` in it."""
    import matplotlib as mpl  # noqa: PLC0415 -- only the picture needs it

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 4), squeeze=False, sharey=True, layout="constrained")
    for (title, (curves, point)), axis in zip(panels.items(), axes[0], strict=True):
        for codec in CODECS:
            points = curves[codec.name]
            levels = [each.psnr for each in points]
            axis.plot([each.rate for each in points], levels, color=codec.colour, label=f"{codec.name}, whole file")
            coded = [each.coded_rate for each in points]
            axis.plot(coded, levels, color=codec.colour, linestyle="--", linewidth=1, label=f"{codec.name}, coded data")
        axis.plot(point.rate, point.psnr, "o", color="black", label=f"{name}, container")
        axis.plot(point.coded_rate, point.psnr, "*", color="black", markersize=11, label=f"{name}, tokens")
        axis.set(xlim=(0, 0.8), ylim=(19, 32), xlabel="bits per pixel")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("PSNR (dB), mean over the images")
    axes[0, -1].legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def side_by_side(rows: Sequence[Sequence[tuple[str, Pixels]]], file: Path) -> None:
    """A row for each image, of captions and pictures [256,256,3], which are not scaled."""
    gap, line = 4, 16
    height, width = rows[0][0][1].shape[:2]
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) - gap, len(rows) * (height + line)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for row, pictures in enumerate(rows):
        for column, (caption, pixels) in enumerate(pictures):
            corner = (column * (width + gap), row * (height + line))
            draw.text((corner[0] + 2, corner[1] + 1), caption, "black", font)
            sheet.paste(Image.fromarray(pixels), (corner[0], corner[1] + line))
    sheet.save(file, quality=90, subsampling=0, optimize=True)


def beside(image: Image.Image, size: int) -> Iterator[tuple[str, Pixels]]:
    """An image by each codec in a file of about `size` bytes, with captions."""
    for codec in CODECS:
        data = nearest_file(codec, image, size)
        pixels = decoded(data)
        yield caption(codec.name, len(data), psnr(pixels, np.asarray(image))), pixels


def caption(name: str, size: int, level: float) -> str:
    return f"{name}: {size:,} bytes, {level:.1f} dB"
