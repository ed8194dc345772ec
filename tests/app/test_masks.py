"""Masks in COCO's run lengths, held against pycocotools, and their way from coefficients to pixels."""

import numpy as np
import pytest
from pycocotools import mask as coco

from app.masks import Mask, decode_mask, paste

SIDE = 16

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def blobs(seed: int) -> np.ndarray:
    """bool [16,16], some of it touching the edges."""
    return decode_mask(np.random.default_rng(seed).normal(size=12).astype(np.float32), SIDE)


def pixels(mask: Mask) -> np.ndarray:
    """bool [H,W] as pycocotools reads it."""
    return coco.decode(mask.rle()).astype(bool)


def by_hand(mask: np.ndarray, box: tuple[float, ...], width: int, height: int) -> np.ndarray:
    """Every pixel alone: bilinear between the centres of the mask's pixels, nothing beyond its edges."""
    left, top, right, bottom = box
    padded = np.pad(mask.astype(float), 2)
    out = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            across, down = (x + 0.5 - left) / (right - left) * SIDE - 0.5, (y + 0.5 - top) / (bottom - top) * SIDE - 0.5
            if not (-1 < across < SIDE and -1 < down < SIDE):
                continue
            i, j = int(np.floor(down)), int(np.floor(across))
            four = padded[i + 2 : i + 4, j + 2 : j + 4]
            v, u = down - i, across - j
            out[y, x] = np.array([1 - v, v]) @ four @ np.array([1 - u, u]) >= 0.5
    return out


BOXES = [(3.3, 4.1, 40.2, 30.7), (-9.7, -5.2, 33.4, 61.3), (20.1, 10.3, 90.7, 20.2), (0, 0, 53, 37), (5.2, 6.1, 5.9, 6.8)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_is_stretched_over_its_box_and_cut_at_the_edges(box: tuple[float, ...], seed: int) -> None:
    pasted = paste(blobs(seed), box, 53, 37)
    expected = by_hand(blobs(seed), box, 53, 37)
    np.testing.assert_array_equal(pixels(pasted), expected)
    assert pasted.rle() == {
        "size": [37, 53],
        "counts": coco.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"].decode(),
    }


def test_large_masks_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paste(blobs(1), BOXES[1], 53, 37)
    monkeypatch.setattr("app.masks.CHUNK", 100)
    assert paste(blobs(1), BOXES[1], 53, 37).rle() == whole.rle()


@pytest.mark.parametrize("box", [(60, 0, 90, 20), (-30, -30, -10, -10), (10, 10, 10, 20), (20, 20, 10, 10)])
def test_a_box_without_a_pixel_has_an_empty_mask(box: tuple[float, ...]) -> None:
    mask = paste(np.ones((SIDE, SIDE), bool), box, 53, 37)
    assert coco.area(mask.rle()) == 0
    assert mask.region()[2].size == 0


def test_a_mask_of_everything() -> None:
    mask = paste(np.ones((SIDE, SIDE), bool), (-9, -9, 70, 50), 53, 37)
    assert mask.runs.tolist() == [0, 53 * 37]
    left, top, region = mask.region()
    assert (left, top, region.shape, region.all()) == (0, 0, (37, 53), True)


@pytest.mark.parametrize("box", BOXES[:4])
def test_the_region_is_the_smallest_that_holds_the_mask(box: tuple[float, ...]) -> None:
    mask = paste(blobs(2), box, 53, 37)
    left, top, region = mask.region()
    expected = pixels(mask)
    assert [left, top, region.shape[1], region.shape[0]] == coco.toBbox(mask.rle()).astype(int).tolist()
    np.testing.assert_array_equal(region, expected[top : top + region.shape[0], left : left + region.shape[1]])


def test_coefficients_weigh_cosines_in_the_order_of_jpeg() -> None:
    values = np.random.default_rng(0).normal(size=10).astype(np.float32)
    spectrum = np.zeros((SIDE, SIDE))
    for value, entry in zip(values, [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)], strict=True):
        spectrum[entry] = value
    place = np.arange(SIDE) + 0.5
    waves = [np.sqrt((2 if k else 1) / SIDE) * np.cos(np.pi * k * place / SIDE) for k in range(SIDE)]
    shades = sum(spectrum[k, m] * np.outer(waves[k], waves[m]) for k in range(SIDE) for m in range(SIDE))
    np.testing.assert_array_equal(decode_mask(values, SIDE), shades > (shades.max() + shades.min()) / 2)
