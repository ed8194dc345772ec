"""Third stage of a request: upright RGB pixels become the exact frame that the engine wants, as the manifest says."""

from dataclasses import dataclass
from typing import Any

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
    raise NotImplementedError


def minimum_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The smallest (width, height) at which a scaled decoding of a `width` x `height` original still serves."""
    raise NotImplementedError


def resize(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> NDArray[Any]:
    """Cut and resize in one Pillow call.

    `image` is upright RGB, possibly smaller than `original` (width, height) after scaled decoding.

    Returns:
        uint8 [height, width, 3], C-contiguous.
    """
    raise NotImplementedError
