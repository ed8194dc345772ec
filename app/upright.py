"""Images for a server behind this one: the file as it came, or written anew where that server could see another picture in it."""

from dataclasses import dataclass
from io import BytesIO

from PIL import Image, JpegImagePlugin, PngImagePlugin  # noqa: F401 -- the writers; else all of Pillow's load

from app.decode import ImageInfo

WIDELY_READ = ("JPEG", "PNG", "WEBP", "GIF")
JPEG_QUALITY = 95


@dataclass(frozen=True)
class UprightFile:
    """An image that needs no turning, in a format that every server reads. Sizes in pixels."""

    content: bytes
    media_type: str
    width: int
    height: int


def upright_file(content: bytes, image: Image.Image, info: ImageInfo) -> UprightFile:
    """`content` itself, unless its EXIF says that it lies on its side, it has several frames or is of a rare format.

    `image` and `info` are what it decodes to: upright RGB. A JPEG that is written anew has quality 95 and no subsampled colours,
    everything else becomes a PNG.
    """
    as_it_came = info.format in WIDELY_READ and info.orientation == 1 and info.frames == 1
    if as_it_came:
        return UprightFile(content, f"image/{info.format.lower()}", info.width, info.height)
    kind = "JPEG" if info.format == "JPEG" else "PNG"
    file = BytesIO()
    if kind == "JPEG":
        image.save(file, kind, quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(file, kind, compress_level=1)
    return UprightFile(file.getvalue(), f"image/{kind.lower()}", info.width, info.height)
