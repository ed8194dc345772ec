"""PSNR and SSIM against their definitions, written out one window at a time."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from app.fidelity import psnr, ssim
from tests.factories import make_image

Image = NDArray[np.uint8]


def pair(width: int = 24, height: int = 17, noise: float = 20.0) -> tuple[Image, Image]:
    one = np.asarray(make_image(width, height))
    other = one + np.random.default_rng(1).normal(0, noise, one.shape)
    return one, other.round().clip(0, 255).astype(np.uint8)


def ssim_by_definition(one: Image, other: Image, size: int = 11) -> float:
    """Equations 13 to 17 of Wang et al. 2004, with every window and its weighted moments spelled out."""
    axis = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for top in range(one.shape[0] - size + 1):
            for left in range(one.shape[1] - size + 1):
                x, y = (image[top : top + size, left : left + size, channel].astype(float) for image in (one, other))
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
                covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
                luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
                values.append(luminance * (2 * covariance + c2) / (variance_x + variance_y + c2))
    return float(np.mean(values))


def test_psnr_of_one_level_everywhere() -> None:
    one = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(one, one + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(one + np.uint8(1), one) == psnr(one, one + np.uint8(1))


def test_the_same_image() -> None:
    one, _ = pair()
    assert psnr(one, one) == math.inf
    assert ssim(one, one) == pytest.approx(1.0)


@pytest.mark.parametrize("noise", [2.0, 20.0, 80.0])
def test_ssim_is_that_of_the_paper(noise: float) -> None:
    one, other = pair(noise=noise)
    assert ssim(one, other) == pytest.approx(ssim_by_definition(one, other), abs=1e-9)
    assert ssim(one, other) == pytest.approx(ssim(other, one), abs=1e-12)


def test_ssim_of_flat_images_is_their_luminance() -> None:
    dark, light = (np.full((16, 16, 3), level, np.uint8) for level in (100, 140))
    assert ssim(dark, light) == pytest.approx((2 * 100 * 140 + 6.5025) / (100**2 + 140**2 + 6.5025))


def test_ssim_of_an_image_smaller_than_the_window() -> None:
    one, other = pair(5, 5)
    assert ssim(one, other) == pytest.approx(ssim_by_definition(one, other, 5), abs=1e-9)
