"""The baseline of a learned tokenizer: as many codes, each a raw patch of pixels, found by k-means.

A reconstruction is the nearest code in the place of every patch: what a codebook does without any network around it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PATCH = 8
_ROWS = 8192  # patches compared with every code at a time

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def patches(image: Pixels) -> Floats:
    """Image uint8 [H,W,3] -> its patches [h*w,192] in the order of reading; what is over at the right and below is left out."""
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    whole = image[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
    return whole.swapaxes(1, 2).reshape(rows * columns, -1).astype(np.float32)


def assemble(values: Floats, width: int) -> Pixels:
    """The inverse of `patches`, of an image `width` pixels wide."""
    columns = width // PATCH
    image = values.reshape(-1, columns, PATCH, PATCH, 3).swapaxes(1, 2).reshape(-1, width, 3)
    return image.round().clip(0, 255).astype(np.uint8)


def nearest(points: Floats, codes: Floats) -> tuple[NDArray[np.int64], float]:
    """Of points [P,D] the index [P] of the nearest of the codes [N,D], and the mean squared distance to it."""
    halves = 0.5 * np.square(codes).sum(1)
    indices = np.empty(len(points), np.int64)
    total = 0.0
    for start in range(0, len(points), _ROWS):
        part = points[start : start + _ROWS]
        scores = part @ codes.T - halves
        found = scores.argmax(1)
        indices[start : start + _ROWS] = found
        total += float(np.square(part).sum(dtype=np.float64) - 2 * scores[np.arange(len(part)), found].sum(dtype=np.float64))
    return indices, total / len(points)


def cluster(points: Floats, count: int, rounds: int, random: np.random.Generator) -> Iterator[tuple[Floats, float]]:
    """Lloyd's k-means: after each round the codes [count,D], and the mean squared distance from those before it.

    It begins at points drawn by chance. A code that is nearest to none begins anew at a point.
    """
    codes = points[random.choice(len(points), count, replace=False)]
    for _ in range(rounds):
        indices, error = nearest(points, codes)
        uses = np.bincount(indices, minlength=count)
        order = np.argsort(indices, kind="stable")
        used = np.flatnonzero(uses)
        starts = np.concatenate([[0], np.cumsum(uses[used])[:-1]])
        codes = codes.copy()
        codes[used] = np.add.reduceat(points[order], starts, dtype=np.float32) / uses[used, None]
        idle = np.flatnonzero(uses == 0)
        codes[idle] = points[random.choice(len(points), len(idle), replace=False)]
        yield codes, error


def reconstruct(image: Pixels, codes: Floats) -> Pixels:
    """Every patch of an image uint8 [H,W,3], whose sides are multiples of 8, replaced by the nearest code."""
    indices, _ = nearest(patches(image), codes)
    return assemble(codes[indices], image.shape[1])
