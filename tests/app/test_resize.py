"""The frame against torchvision's Resize and CenterCrop on Pillow images, and the geometry by hand."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from app.manifest import Preprocessing
from app.resize import content_size, minimum_size, place, resize
from tests.factories import make_image

SIZES = [
    (500, 334),
    (334, 500),
    (333, 333),
    (257, 301),
    (1001, 667),
    (97, 61),
    (30, 23),
    (64, 64),
    (17, 40),
    (1, 9),
    (9, 1),
    (1, 1),
]
INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


def preprocessing(size: int = 56, short: int = 64, policy: str = "shortest_edge", **fields: Any) -> Preprocessing:
    defaults = {"height": size, "width": size, "resize_height": short, "resize_width": short, "interpolation": "bilinear"}
    return Preprocessing.model_validate(defaults | {"policy": policy} | fields)


def by_torchvision(image: Image.Image, wanted: Preprocessing) -> np.ndarray:
    size = [wanted.resize_height] if wanted.policy == "shortest_edge" else [wanted.resize_height, wanted.resize_width]
    resized = reference.resize(image, size, InterpolationMode(wanted.interpolation))
    return np.asarray(reference.center_crop(resized, [wanted.height, wanted.width]))


@cache
def _image(width: int, height: int) -> Image.Image:
    """Making one takes longer than the test of it."""
    return make_image(width, height, seed=1)


def share_that_differs(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of values that differ at all, by 1 level; at most 1 in 10,000 by 2 (a rounding between the passes, enlarged)."""
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert (difference == 2).mean() <= 1e-4
    return float((difference > 0).mean())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", [(56, 64), (57, 63), (224, 256), (32, 32)], ids=str)
def test_equals_torchvision(size: tuple[int, int], target: tuple[int, int], interpolation: str) -> None:
    image = _image(*size)
    wanted = preprocessing(*target, interpolation=interpolation)
    assert share_that_differs(resize(image, wanted, image.size), by_torchvision(image, wanted)) < 0.002


@pytest.mark.parametrize("seed", range(60))
def test_equals_torchvision_for_any_size(seed: int) -> None:
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(1, 700, 2))
    crop = int(random.integers(1, 257))
    wanted = preprocessing(crop, int(random.integers(crop, 300)), interpolation="bicubic")
    image = make_image(width, height, seed)
    assert share_that_differs(resize(image, wanted, image.size), by_torchvision(image, wanted)) < 0.002


def test_a_frame_one_pixel_off_would_be_seen() -> None:
    image, wanted = make_image(500, 334), preprocessing()
    shifted = np.roll(by_torchvision(image, wanted), 1, axis=1)
    assert (np.abs(resize(image, wanted, image.size).astype(int) - shifted) > 1).mean() > 0.2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stretch_equals_torchvision(size: tuple[int, int]) -> None:
    image = make_image(*size)
    wanted = preprocessing(policy="stretch", height=40, width=56, resize_height=48, resize_width=57, interpolation="bicubic")
    assert share_that_differs(resize(image, wanted, image.size), by_torchvision(image, wanted)) < 0.002


def test_stretch_without_a_crop_is_pillows_resize() -> None:
    image = make_image(97, 61)
    wanted = preprocessing(policy="stretch", height=40, width=56, resize_height=40, resize_width=56)
    np.testing.assert_array_equal(resize(image, wanted, image.size), np.asarray(image.resize((56, 40), Image.Resampling.BILINEAR)))


def test_a_rectangular_frame() -> None:
    image, wanted = make_image(333, 500), preprocessing(height=60, width=40)
    frame = resize(image, wanted, image.size)
    assert frame.shape == (60, 40, 3)
    assert share_that_differs(frame, by_torchvision(image, wanted)) < 0.002


@pytest.mark.parametrize(
    ("size", "inner"), [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((64, 64), (64, 64)), ((7, 3), (64, 27))]
)
def test_letterbox_pads_right_and_bottom(size: tuple[int, int], inner: tuple[int, int]) -> None:
    image, wanted = make_image(*size), preprocessing(64, policy="letterbox", fill=(114, 0, 7), interpolation="bicubic")
    frame = resize(image, wanted, image.size)
    width, height = inner
    np.testing.assert_array_equal(frame[:height, :width], np.asarray(image.resize(inner, Image.Resampling.BICUBIC)))
    assert (frame[height:] == (114, 0, 7)).all()
    assert (frame[:, width:] == (114, 0, 7)).all()
    assert content_size(*image.size, wanted) == (height, width)


@pytest.mark.parametrize(
    ("size", "inner", "at"),
    [((100, 50), (64, 32), (0, 16)), ((50, 100), (32, 64), (16, 0)), ((64, 64), (64, 64), (0, 0)), ((7, 3), (64, 27), (0, 18))],
)
def test_a_centred_letterbox_pads_on_all_sides(size: tuple[int, int], inner: tuple[int, int], at: tuple[int, int]) -> None:
    """The odd pixel of padding goes to the right or the bottom."""
    image = make_image(*size)
    wanted = preprocessing(64, policy="letterbox", anchor="centre", fill=(114, 0, 7), interpolation="bilinear")
    frame = resize(image, wanted, image.size).copy()
    (width, height), (left, top) = inner, at
    held = frame[top : top + height, left : left + width]
    np.testing.assert_array_equal(held, np.asarray(image.resize(inner, Image.Resampling.BILINEAR)))
    held[:] = (114, 0, 7)
    assert (frame == (114, 0, 7)).all()


def test_letterbox_keeps_a_pixel_of_a_thread() -> None:
    image, wanted = Image.new("RGB", (1000, 1), "red"), preprocessing(64, policy="letterbox")
    frame = resize(image, wanted, image.size)
    assert (frame[0] == (255, 0, 0)).all()
    assert (frame[1:] == 0).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)], ids=str)
def test_a_thread_does_not_take_the_memory_of_its_enlargement(size: tuple[int, int], interpolation: str) -> None:
    """All of it enlarged would be 224 x 6,720,000 pixels: 6 GB."""
    image = Image.new("RGB", size, (10, 200, 30))
    frame = resize(image, preprocessing(224, 224, interpolation=interpolation), size)
    assert (frame == (10, 200, 30)).all()


@pytest.mark.parametrize("short", [55, 40, 1])
def test_a_crop_larger_than_the_image_is_padded_as_by_torchvision(short: int) -> None:
    image, wanted = make_image(100, 70), preprocessing(56, short)
    np.testing.assert_allclose(resize(image, wanted, image.size).astype(int), by_torchvision(image, wanted), atol=1)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_array_is_what_the_engine_takes(interpolation: str) -> None:
    frame = resize(make_image(90, 70), preprocessing(interpolation=interpolation), (90, 70))
    assert frame.dtype == np.uint8
    assert frame.shape == (56, 56, 3)
    assert frame.flags.c_contiguous


@pytest.mark.parametrize("divisor", [2, 4, 8])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("policy", ["shortest_edge", "stretch", "letterbox"])
def test_an_image_scaled_while_decoding_gives_the_same_frame(divisor: int, interpolation: str, policy: str) -> None:
    """On a ramp every resampling is exact, so that a frame that lies elsewhere is seen; 8 does not divide the sides."""
    width, height = 1003, 669
    wanted = preprocessing(policy=policy, interpolation=interpolation)
    y, x = np.mgrid[0:height, 0:width]
    ramp = Image.fromarray(np.stack([x / 4, y / 4, (x + y) / 8], axis=-1).astype(np.uint8))
    scaled = ramp.resize((-(-width // divisor), -(-height // divisor)), Image.Resampling.BOX, (0, 0, width, height))
    exact = (
        Image.fromarray(np.asarray(ramp)[divisor // 2 :: divisor, divisor // 2 :: divisor])
        if interpolation == "nearest"
        else scaled
    )
    assert exact.size == scaled.size or interpolation == "nearest"
    padded = scaled if exact.size != scaled.size else exact
    ours, full = resize(padded, wanted, (width, height)), resize(ramp, wanted, (width, height))
    assert np.abs(ours.astype(int) - full).max() <= (4 if interpolation == "nearest" else 2)


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_mark_stays_where_it_was_after_scaled_decoding(divisor: int) -> None:
    """1001 / 8 is 126 pixels, the last one mostly empty: taken as 1001 / 126 the mark would move by a third of a pixel."""
    pixels = np.zeros((1001, 1001, 3), np.uint8)
    pixels[928:976, 928:976] = 255
    original = Image.fromarray(pixels)
    wanted = preprocessing(policy="stretch", resize_height=56, resize_width=56)
    full, scaled = (resize(image, wanted, original.size)[..., 0].astype(float) for image in (original, original.reduce(divisor)))
    for axis in (0, 1):
        assert _centre(scaled, axis) == pytest.approx(_centre(full, axis), abs=0.05)


def _centre(frame: np.ndarray, axis: int) -> float:
    """The centre of brightness of a grey frame [H,W] along `axis`, in pixels."""
    weights = frame.sum(axis=1 - axis)
    return float((weights * (np.arange(len(weights)) + 0.5)).sum() / weights.sum())


def test_place_maps_the_centre_of_a_landscape() -> None:
    placement = place(500, 334, preprocessing(224, 256))
    # torchvision: 334 -> 256, 500 -> int(383.23) = 383; crop at round(79.5) = 80 and 16.
    assert placement.scale_x == 383 / 500
    assert placement.scale_y == 256 / 334
    assert placement.left == pytest.approx(80 * 500 / 383)
    assert placement.top == pytest.approx(16 * 334 / 256)


def test_place_of_a_letterbox_starts_at_the_corner() -> None:
    placement = place(100, 50, preprocessing(64, policy="letterbox"))
    assert (placement.left, placement.top, placement.scale_x, placement.scale_y) == (0, 0, 0.64, 0.64)


@pytest.mark.parametrize("size", [(500, 334), (334, 500), (333, 333), (257, 301), (31, 7)], ids=str)
@pytest.mark.parametrize("anchor", ["corner", "centre"])
def test_undoing_a_letterbox_gives_the_original_back(size: tuple[int, int], anchor: str) -> None:
    width, height = size
    wanted = preprocessing(96, policy="letterbox", anchor=anchor)
    placement = place(width, height, wanted)
    frame = resize(Image.new("RGB", size, "white"), wanted, size)[..., 0]
    rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
    held = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    np.testing.assert_allclose(placement.undo(held), [0, 0, width, height], atol=1e-9)
    corner = np.array([placement.left, placement.top])
    scale = np.array([placement.scale_x, placement.scale_y])
    box = np.array([[1.5, 2.25, width - 0.5, height - 1.0], [0.0, 0.0, 3.0, 4.0]])
    on_frame = (box - np.tile(corner, 2)) * np.tile(scale, 2)
    np.testing.assert_allclose(placement.undo(on_frame), box, atol=1e-9)


@pytest.mark.parametrize("policy", ["shortest_edge", "stretch", "letterbox", "centred letterbox"])
@pytest.mark.parametrize("size", [(300, 200), (211, 333), (40, 50)], ids=str)
def test_place_says_where_a_mark_of_the_original_lands(size: tuple[int, int], policy: str) -> None:
    width, height = size
    x, y = width * 0.55, height * 0.4
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[round(y) - 8 : round(y) + 8, round(x) - 8 : round(x) + 8] = 255
    centred = {"anchor": "centre"} if policy.startswith("centred") else {}
    wanted = preprocessing(policy=policy.rpartition(" ")[2], resize_width=70 if policy == "stretch" else 64, **centred)
    frame = resize(Image.fromarray(pixels), wanted, size)[..., 0].astype(float)
    placement = place(width, height, wanted)
    assert _centre(frame, 1) == pytest.approx((round(x) - placement.left) * placement.scale_x, abs=0.1)
    assert _centre(frame, 0) == pytest.approx((round(y) - placement.top) * placement.scale_y, abs=0.1)


def test_minimum_size_is_the_whole_resized_image() -> None:
    assert minimum_size(500, 334, preprocessing(224, 256)) == (383, 256)
    assert minimum_size(500, 334, preprocessing(56, policy="stretch", resize_width=60)) == (60, 64)
    assert minimum_size(500, 250, preprocessing(56, policy="letterbox")) == (56, 28)
