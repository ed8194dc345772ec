"""How close an image that came back is to the one that went in: PSNR and SSIM of two uint8 images of one size."""

import math

import numpy as np
from numpy.typing import NDArray

LEVELS = 255.0
WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2

Floats = NDArray[np.float64]


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all values of two images [H,W,3], in dB; infinite when they are the same."""
    error = float(np.mean(np.square(one.astype(np.float64) - other)))
    return math.inf if error == 0 else 10 * math.log10(LEVELS**2 / error)


def ssim(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Structural similarity (Wang et al. 2004) of two images [H,W,3]: the mean over the channels, 1 for the same image.

    Windows are Gaussian, 11 x 11 with a sigma of 1.5, and lie wholly within the image; an image with fewer pixels than that to a
    side has a window of its own size.
    """
    return float(np.mean([_ssim(one[..., channel], other[..., channel]) for channel in range(one.shape[-1])]))


def _ssim(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Of one channel [H,W]."""
    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y, square_x, square_y, product = _local_means(np.stack([x, y, x * x, y * y, x * y]))
    variances = square_x - mean_x**2 + square_y - mean_y**2
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * (product - mean_x * mean_y) + C2) / (variances + C2)
    return float(np.mean(luminance * structure))


def _local_means(planes: Floats) -> Floats:
    """Gaussian means of planes [N,H,W] at every place where the whole window fits: [N,H-10,W-10]."""
    for _ in ("along the rows", "along the columns"):
        weights = _gaussian(min(WINDOW, planes.shape[-1]))
        places = planes.shape[-1] - len(weights) + 1
        means = np.zeros((*planes.shape[:-1], places))
        for first, weight in enumerate(weights):
            means += weight * planes[..., first : first + places]
        planes = means.swapaxes(-1, -2)
    return planes


def _gaussian(size: int) -> Floats:
    distances = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (distances / SIGMA) ** 2)
    normalised: Floats = weights / weights.sum()
    return normalised
