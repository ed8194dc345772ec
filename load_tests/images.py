"""The test images, made of a photo that matplotlib ships (Grace Hopper, US Navy, public domain): `python -m load_tests.images`.

Enlarged ones get seeded grain, as a sensor gives it, so that a JPEG of them costs what a photo of that size costs to decode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from load_tests.cache import cache


@dataclass(frozen=True)
class Photo:
    """A file to make: its pixels, and the size in bytes that a JPEG's quality is chosen for."""

    file: str
    width: int
    height: int
    bytes: int = 0

    @property
    def content_type(self) -> str:
        return "image/png" if self.file.endswith(".png") else "image/jpeg"

    @property
    def path(self) -> Path:
        return cache() / "images" / self.file


PHOTOS = {
    "500x334": Photo("500x334.jpg", 500, 334, 57_000),
    "1920x1281": Photo("1920x1281.jpg", 1920, 1281, 600_000),
    "12mp": Photo("12mp.jpg", 4000, 3000, 4_000_000),
    "png": Photo("500x334.png", 500, 334),
}


def make(photo: Photo, path: Path) -> None:
    """Write `photo` to `path`; the same bytes every time with the same Pillow."""
    image = _enlarged(_source(), photo.width, photo.height)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_jpeg(image, photo.bytes) if photo.bytes else _saved(image, "PNG"))


def make_all() -> None:
    """Write the photos that are not there yet."""
    for photo in PHOTOS.values():
        if not photo.path.is_file():
            make(photo, photo.path)


def _source() -> Image.Image:
    import matplotlib  # noqa: PLC0415 -- only its data is wanted, and only here

    return Image.open(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").convert("RGB")


def _enlarged(source: Image.Image, width: int, height: int) -> Image.Image:
    """The largest part of `source` of the wanted shape, from the top (the face), resized, with grain where it was enlarged."""
    scale = max(width / source.width, height / source.height)
    box = (0.0, 0.0, width / scale, height / scale)
    image = source.resize((width, height), Image.Resampling.LANCZOS, box)
    if scale <= 1:
        return image
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3)).astype(np.float32)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, size: int) -> bytes:
    """The JPEG (4:2:0) of the quality whose size is nearest to `size` bytes."""
    return _nearest(lambda quality: _saved(image, "JPEG", quality=quality), size)


def _nearest(encode: Callable[[int], bytes], size: int) -> bytes:
    low, high = 1, 98
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(middle)) < size else (low, middle)
    return min((encode(low), encode(high)), key=lambda data: abs(len(data) - size))


def _saved(image: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


if __name__ == "__main__":
    make_all()
    for name, each in PHOTOS.items():
        print(f"{name:10} {each.width} x {each.height}  {each.path.stat().st_size:>9,} bytes  {each.path}")
