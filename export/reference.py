"""The other side of verification: an image prepared as people do beside torch, by Pillow and torchvision's transforms."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Pad, Resize

from app.manifest import Preprocessing


def reference_pixels(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode at full size, turn upright, resize and cut: uint8 [height,width,3]."""
    image = _open_upright(data)
    return np.asarray(_transform(*image.size, preprocessing)(image))


def reference_content(data: bytes, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) of the part of the frame that is no padding."""
    if preprocessing.policy != "letterbox":
        return preprocessing.height, preprocessing.width
    return _fitted(*_open_upright(data).size, preprocessing)


def _open_upright(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def _fitted(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) of a letterbox's image."""
    scale = min(preprocessing.width / width, preprocessing.height / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _transform(width: int, height: int, preprocessing: Preprocessing) -> Compose:
    frame = (preprocessing.height, preprocessing.width)
    interpolation = InterpolationMode(preprocessing.interpolation)
    if preprocessing.policy == "letterbox":
        inner = _fitted(width, height, preprocessing)
        spare = (frame[1] - inner[1], frame[0] - inner[0])
        before = (spare[0] // 2, spare[1] // 2) if preprocessing.anchor == "centre" else (0, 0)
        padding = [*before, spare[0] - before[0], spare[1] - before[1]]
        return Compose([Resize(inner, interpolation), Pad(padding, preprocessing.fill)])
    size = preprocessing.resize_height
    stretched = (preprocessing.resize_height, preprocessing.resize_width)
    return Compose([Resize(size if preprocessing.policy == "shortest_edge" else stretched, interpolation), CenterCrop(frame)])
