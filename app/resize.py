"""Third stage of a request: upright RGB pixels become the exact frame that the engine wants, as the manifest says."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.manifest import Preprocessing


@dataclass(frozen=True)
class Placement:
    """Where the frame lies in the upright original: frame x = (x - left) * scale_x, the same for y. Original pixels."""

    left: float
    top: float
    scale_x: float
    scale_y: float


def place(width: int, height: int, preprocessing: Preprocessing) -> Placement:
    """Placement of the frame for an original of `width` x `height`, with torchvision's rounding of the intermediate size."""
    across, down = _axes(width, height, preprocessing)
    return Placement(left=across.offset / across.scale, top=down.offset / down.scale, scale_x=across.scale, scale_y=down.scale)


def minimum_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The smallest (width, height) at which a scaled decoding of a `width` x `height` original still serves: nothing is enlarged
    that would not have been."""
    return _intermediate_size(width, height, preprocessing)


def resize(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> NDArray[Any]:
    """Cut and resize in one Pillow call.

    `image` is upright RGB, possibly smaller than `original` (width, height) after scaled decoding.

    Returns:
        uint8 [height, width, 3], C-contiguous, not to be written to.
    """
    across, down = _axes(*original, preprocessing)
    reduced = _reduction(image.size, original)
    (left, right), (top, bottom) = across.source(image.width, reduced), down.source(image.height, reduced)
    interpolation = Image.Resampling[preprocessing.interpolation.upper()]
    if interpolation is Image.Resampling.NEAREST:
        # It takes one pixel each, and which one must not hang on the last bit of a box: resize all, then cut.
        whole = (0, 0, min(original[0] / reduced, image.width), min(original[1] / reduced, image.height))
        resized = image.resize((across.resized, down.resized), interpolation, whole)
        cut = resized.crop((across.first, down.first, across.last, down.last))
    else:
        cut = image.resize((across.last - across.first, down.last - down.first), interpolation, (left, top, right, bottom))
    if cut.size == (preprocessing.width, preprocessing.height):
        return np.asarray(cut)
    frame = np.full((preprocessing.height, preprocessing.width, 3), preprocessing.fill, np.uint8)
    frame[down.first - down.offset : down.last - down.offset, across.first - across.offset : across.last - across.offset] = (
        np.asarray(cut)
    )
    return frame


@dataclass(frozen=True)
class _Axis:
    """One axis of the work: `original` pixels become `resized`, and the frame is the `size` of them from `offset` on.

    A negative offset, or too few resized pixels, leaves the frame's edge to the fill.
    """

    original: int
    resized: int
    size: int
    offset: int

    @property
    def scale(self) -> float:
        return self.resized / self.original

    @property
    def first(self) -> int:
        """The first resized pixel that the frame holds."""
        return max(0, self.offset)

    @property
    def last(self) -> int:
        """One behind the last resized pixel that the frame holds."""
        return min(self.resized, self.offset + self.size)

    def source(self, pixels: int, reduced: float) -> tuple[float, float]:
        """Where `first` and `last` lie in an image of `pixels`, the original reduced by `reduced`."""
        return self.first / self.scale / reduced, min(self.last / self.scale / reduced, pixels)


def _axes(width: int, height: int, preprocessing: Preprocessing) -> tuple[_Axis, _Axis]:
    """The horizontal and the vertical axis for an original of `width` x `height`."""
    resized = _intermediate_size(width, height, preprocessing)
    frame = (preprocessing.width, preprocessing.height)
    across, down = (
        _Axis(old, new, size, 0 if preprocessing.policy == "letterbox" else _crop_offset(new, size))
        for old, new, size in zip((width, height), resized, frame, strict=True)
    )
    return across, down


def _intermediate_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) of the whole resized image, before the crop or the padding."""
    if preprocessing.policy == "stretch":
        return preprocessing.resize_width, preprocessing.resize_height
    if preprocessing.policy == "letterbox":
        scale = min(preprocessing.width / width, preprocessing.height / height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    short = preprocessing.resize_height
    # Written as torchvision does, to truncate where it does.
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def _crop_offset(resized: int, size: int) -> int:
    """torchvision's CenterCrop: half to even when cutting, the odd pixel to the right when it must pad."""
    return round((resized - size) / 2) if resized >= size else -((size - resized) // 2)


def _reduction(size: tuple[int, int], original: tuple[int, int]) -> float:
    """By how much scaled decoding divided the original: it gives ceil(original / n) pixels, the last of them partly empty."""
    return next((n for n in (1, 2, 4, 8) if size == tuple(-(-side // n) for side in original)), original[0] / size[0])
