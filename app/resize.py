"""Third stage of a request: upright RGB pixels become the exact frame that the engine wants, as the manifest says."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.manifest import Preprocessing


@dataclass(frozen=True)
class Placement:
    """Where the frame lies in the upright original: frame x = (x - left) * scale_x, the same for y. Original pixels.

    `left` and `top` are negative where the frame begins before the image, as a centred letterbox does.
    """

    left: float
    top: float
    scale_x: float
    scale_y: float

    def undo(self, boxes: NDArray[Any]) -> NDArray[np.float64]:
        """Boxes xyxy [...,4] in pixels of the frame as pixels of the original, beyond its edges where they lie on the padding."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        original: NDArray[np.float64] = boxes / scale + np.array([self.left, self.top] * 2)
        return original


def place(width: int, height: int, preprocessing: Preprocessing) -> Placement:
    """Placement of the frame for an original of `width` x `height`, with torchvision's rounding of the intermediate size."""
    across, down = _axes(width, height, preprocessing)
    return Placement(left=across.offset / across.scale, top=down.offset / down.scale, scale_x=across.scale, scale_y=down.scale)


def minimum_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The smallest (width, height) at which a scaled decoding of a `width` x `height` original still serves: nothing is enlarged
    that would not have been."""
    return _intermediate_size(width, height, preprocessing)


def content_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) of what the frame shows of an original of `width` x `height`: the input `content` of an engine."""
    across, down = _axes(width, height, preprocessing)
    return down.last - down.first, across.last - across.first


def resize(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> NDArray[Any]:
    """Cut and resize without making the pixels that the crop would throw away.

    `image` is upright RGB, possibly smaller than `original` (width, height) after scaled decoding.

    Returns:
        uint8 [height, width, 3], C-contiguous, not to be written to.
    """
    across, down = _axes(*original, preprocessing)
    filter_ = Image.Resampling[preprocessing.interpolation.upper()]
    resample = _whole_then_cut if _ties(across, down, filter_) else _box
    cut = np.asarray(resample(image, across, down, filter_, _reduction(image.size, original)))
    if cut.shape == (preprocessing.height, preprocessing.width, 3):
        return cut
    frame = np.full((preprocessing.height, preprocessing.width, 3), preprocessing.fill, np.uint8)
    frame[down.first - down.offset : down.last - down.offset, across.first - across.offset : across.last - across.offset] = cut
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


def _ties(across: _Axis, down: _Axis, filter_: Image.Resampling) -> bool:
    """Whether the last bit of a box's coordinates, which Pillow keeps in 32 bits, would be seen in the frame.

    Nearest and box decide between pixels, and the small fractions of a small image round half up or down. Then all of the image is
    resized and cut afterwards, unless it is so long and thin that this would take much memory.
    """
    affordable = across.resized * down.resized <= 2_000_000
    small = across.original * down.original <= 128 * 128
    return affordable and (small or filter_ in (Image.Resampling.NEAREST, Image.Resampling.BOX))


def _whole_then_cut(image: Image.Image, across: _Axis, down: _Axis, filter_: Image.Resampling, reduced: float) -> Image.Image:
    whole = (0, 0, min(across.original / reduced, image.width), min(down.original / reduced, image.height))
    resized = image.resize((across.resized, down.resized), filter_, whole)
    return resized.crop((across.first, down.first, across.last, down.last))


def _box(image: Image.Image, across: _Axis, down: _Axis, filter_: Image.Resampling, reduced: float) -> Image.Image:
    """Resize the part of `image` that the crop keeps, in the order of passes in which Pillow would resize all of it.

    Pillow rounds to 8 bits between the horizontal and the vertical pass. For a tall image and a square crop it would take the
    vertical one first where for the whole image it does not, and a quarter of the values would differ: then each pass is a call.
    """
    size = (across.last - across.first, down.last - down.first)
    (left, right), (top, bottom) = across.source(image.width, reduced), down.source(image.height, reduced)
    if _vertical_first(image.size, (across.resized, down.resized)) or not _vertical_first(image.size, size):
        return image.resize(size, filter_, (left, top, right, bottom))
    reach = math.ceil(_LARGEST_SUPPORT * max(1, (bottom - top) / size[1])) + 1
    first, last = max(0, int(top) - reach), min(image.height, math.ceil(bottom) + reach)
    rows = image.crop((0, first, image.width, last))
    columns = rows.resize((size[0], rows.height), filter_, (left, 0, right, rows.height))
    return columns.resize(size, filter_, (0, top - first, size[0], bottom - first))


_LARGEST_SUPPORT = 3  # lanczos looks at 3 pixels to each side, scaled when it shrinks; the others at fewer


def _vertical_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """The order that Pillow 13 takes: vertical first where the height shrinks by more than twice as many pixels as the width."""
    return old[1] - new[1] > max(0, 2 * (old[0] - new[0]))


def _axes(width: int, height: int, preprocessing: Preprocessing) -> tuple[_Axis, _Axis]:
    """The horizontal and the vertical axis for an original of `width` x `height`."""
    resized = _intermediate_size(width, height, preprocessing)
    frame = (preprocessing.width, preprocessing.height)
    across, down = (
        _Axis(
            old,
            new,
            size,
            0 if preprocessing.policy == "letterbox" and preprocessing.anchor == "corner" else _crop_offset(new, size),
        )
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
