"""Instance masks: from the coefficients of an engine to pixels of the original, kept as COCO's run lengths."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CHUNK = 1_000_000  # pixels of a mask that are floats at a time
Box = tuple[float, float, float, float]
"""xyxy in pixels."""


@dataclass(frozen=True)
class Mask:
    """A mask over a picture of `height` x `width` pixels, the way COCO keeps it.

    `runs` int64 [n]: lengths of the runs of 0 and 1 by turns, down the columns and from left to right, beginning with 0.
    """

    height: int
    width: int
    runs: NDArray[np.int64]

    def rle(self) -> dict[str, object]:
        """COCO's compressed form, which pycocotools reads: `size` (height, width) and the string `counts`."""
        return {"size": [self.height, self.width], "counts": compress(self.runs)}

    def region(self) -> tuple[int, int, NDArray[np.bool_]]:
        """Left, top and bool [h,w] of the smallest rectangle that holds the mask; [0,0] where nothing is in it."""
        ends = np.cumsum(self.runs)
        if len(ends) < 2:
            return 0, 0, np.zeros((0, 0), np.bool_)
        first = int(ends[0]) // self.height
        last = -(-int(ends[(len(ends) - 1) // 2 * 2 - 1 if len(ends) % 2 else -1]) // self.height)
        begin, end = first * self.height, last * self.height
        within: NDArray[np.int64] = np.diff(np.clip(ends, begin, end), prepend=begin).astype(np.int64)
        columns = np.repeat(np.arange(len(ends)) % 2 == 1, within).reshape(last - first, self.height)
        rows = np.flatnonzero(columns.any(0))
        return first, int(rows[0]), columns[:, rows[0] : rows[-1] + 1].T


def compress(runs: NDArray[np.int64]) -> str:
    """Run lengths as the string of COCO: differences to the run before the last, 5 bits in a character, the lowest first."""
    values = runs.copy()
    values[3:] -= runs[1:-2]
    characters = bytearray()
    for value in values.tolist():
        more = True
        while more:
            low, value = value & 31, value >> 5  # noqa: PLW2901 -- eaten from below
            more = value != (-1 if low & 16 else 0)
            characters.append(48 + low + 32 * more)
    return characters.decode("ascii")


def decode_mask(coefficients: NDArray[np.float32], side: int) -> NDArray[np.bool_]:
    """The mask bool [side,side] of a box from the first coefficients float32 [count] of its cosine transform, in zigzag order."""
    rows, columns = _zigzag(side)
    count = len(coefficients)
    spectrum = np.zeros((side, side))
    spectrum[rows[:count], columns[:count]] = coefficients
    basis = _cosines(side)
    shades: NDArray[np.float64] = basis.T @ spectrum @ basis
    inside: NDArray[np.bool_] = shades > (shades.max() + shades.min()) / 2
    return inside


def paste(mask: NDArray[np.bool_], box: Box, width: int, height: int) -> Mask:
    """Stretch `mask` [side,side] over `box`, which may reach beyond the picture of `width` x `height`, and cut off what does.

    A pixel is in the mask where the four nearest of the mask, weighted by how near they are, make at least a half.
    """
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        return Mask(height, width, np.array([height * width]))
    across, down = _Stretch(left, right, width, len(mask)), _Stretch(top, bottom, height, len(mask))
    padded = np.pad(mask.T.astype(np.float32), 1)  # columns first, as the runs go; zeros beyond the edges
    rows = down.mix(padded.T).T
    step = max(1, CHUNK // max(1, down.count))
    flips = []
    for start in range(0, across.count, step):
        inside = np.pad(across.mix(rows, start, start + step) >= 0.5, ((0, 0), (1, 1)))
        column, row = np.nonzero(inside[:, 1:] != inside[:, :-1])
        flips.append((across.first + start + column) * height + down.first + row)
    return Mask(height, width, _runs(np.concatenate(flips) if flips else np.zeros(0, np.int64), height * width))


class _Stretch:
    """One axis of a mask of `side` over the pixels `begin` to `end`: those of `size` that it reaches, and between what they lie."""

    def __init__(self, begin: float, end: float, size: int, side: int) -> None:
        self.first = int(np.clip(np.floor(begin) - 1, 0, size))
        self.count = max(0, int(np.clip(np.ceil(end) + 1, 0, size)) - self.first)
        centres = np.arange(self.first, self.first + self.count) + 0.5
        places = np.clip((centres - begin) / (end - begin) * side + 0.5, 0, side + 1)  # counted in the padded mask
        self.before = np.minimum(places.astype(np.int64), side)
        self.share = (places - self.before).astype(np.float32)[:, None]

    def mix(self, lines: NDArray[np.float32], start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Lines [side + 2, n] of a padded mask to those of the pixels `start` to `stop`: [stop - start, n]."""
        before, share = self.before[start:stop], self.share[start:stop]
        mixed: NDArray[np.float32] = lines[before] * (1 - share) + lines[before + 1] * share
        return mixed


def _runs(flips: NDArray[np.int64], pixels: int) -> NDArray[np.int64]:
    """Where the mask turns over, in order, to run lengths. A column that ends where the next begins turns over twice there."""
    twice = np.flatnonzero(flips[1:] == flips[:-1])
    flips = np.delete(flips, np.concatenate([twice, twice + 1]))
    ends = flips if len(flips) and flips[-1] == pixels else np.append(flips, pixels)
    return np.diff(ends, prepend=0).astype(np.int64)


@lru_cache(maxsize=8)
def _zigzag(side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows and the columns of a square in JPEG's order: along the diagonals, up and down by turns."""
    row, column = (axis.ravel() for axis in np.indices((side, side)))
    diagonal = row + column
    order = np.lexsort((np.where(diagonal % 2, row, column), diagonal))
    return row[order], column[order]


@lru_cache(maxsize=8)
def _cosines(side: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II, a matrix [side,side]."""
    frequency, place = np.arange(side)[:, None], np.arange(side) + 0.5
    basis: NDArray[np.float64] = np.sqrt(np.where(frequency == 0, 1, 2) / side) * np.cos(np.pi * place * frequency / side)
    return basis
