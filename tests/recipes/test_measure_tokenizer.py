"""What a tokenizer is measured with and held against: views, the use of codes, patches as codes, the curves of codecs."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import patch_codes
import pytest
from measure_tokenizer import MARKS, VIEWS, Measured, Restored, document, figures, perplexity, views
from numpy.typing import NDArray
from PIL import Image
from rate_distortion import (
    CODECS,
    Codec,
    Point,
    at_rate,
    curve,
    decoded,
    encode_png,
    nearest_file,
)

from app.fidelity import psnr

PHOTO = Path(__file__).parent.parent.parent / "docs/photos/espresso.jpg"
NAMES = [codec.name for codec in CODECS]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """A square of a photo, small enough to encode often."""
    return Image.open(PHOTO).resize((96, 96), Image.Resampling.BICUBIC, (130, 40, 450, 360))


@pytest.fixture(scope="module")
def points() -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    centres = random.uniform(0, 255, (12, 192))
    return (centres[random.integers(0, 12, 600)] + random.normal(0, 4, (600, 192))).astype(np.float32)


def test_perplexity_counts_codes_that_are_used_evenly() -> None:
    assert perplexity(np.array([7] * 12)) == pytest.approx(12)
    assert perplexity(np.array([5, 5, 0, 0])) == pytest.approx(2)
    assert perplexity(np.array([9, 0])) == pytest.approx(1)
    assert 1 < perplexity(np.array([9, 1])) < 2


def test_k_means_comes_nearer_each_round(points: NDArray[np.float32]) -> None:
    rounds = list(patch_codes.cluster(points, 12, 6, np.random.default_rng(1)))
    errors = [error for _, error in rounds]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    assert patch_codes.nearest(points, rounds[-1][0])[1] <= errors[-1] * (1 + 1e-5)


def test_the_nearest_code_is_that_of_the_smallest_distance(points: NDArray[np.float32]) -> None:
    codes = points[:5]
    indices, error = patch_codes.nearest(points, codes)
    distances = np.square(points[:, None].astype(np.float64) - codes).sum(-1)
    np.testing.assert_array_equal(indices, distances.argmin(1))
    assert error == pytest.approx(distances.min(1).mean(), rel=1e-4)


def test_patches_are_put_together_again() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    cut = patch_codes.patches(pixels)
    assert cut.shape == (15, 192)
    np.testing.assert_array_equal(cut[6], pixels[8:16, 8:16].ravel())
    np.testing.assert_array_equal(patch_codes.assemble(cut, 40), pixels)
    np.testing.assert_array_equal(patch_codes.reconstruct(pixels, cut), pixels)


def test_the_views_are_the_centre() -> None:
    width, height = 768, 512
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.arange(width) // 3
    ramp[..., 1] = np.arange(height)[:, None] // 2
    seen = {name: np.asarray(view).astype(int) for name, view in views(Image.fromarray(ramp)).items()}
    assert seen.keys() == VIEWS.keys()
    np.testing.assert_array_equal(seen["cut"], ramp[128:384, 256:512])
    assert seen["resized"].shape == (256, 256, 3)
    assert abs(int(seen["resized"][128, 0, 0]) - 128 // 3) <= 1
    assert abs(int(seen["resized"][128, 255, 0]) - 639 // 3) <= 1


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_more_bits_are_a_better_image(codec: Codec, image: Image.Image) -> None:
    curve_points = curve(codec, [image])
    rates = [point.rate for point in curve_points]
    assert rates == sorted(rates)
    assert curve_points[-1].psnr > curve_points[0].psnr + 3
    assert all(later.psnr > earlier.psnr - 0.1 for earlier, later in itertools.pairwise(curve_points))
    assert all(point.coded_rate < point.rate for point in curve_points)


@pytest.mark.parametrize("codec", [replace(CODECS[0], options={}), *CODECS[1:]], ids=NAMES)
def test_coded_data_is_the_file_without_what_is_always_there(codec: Codec, image: Image.Image) -> None:
    """With the codec's own tables (not those made for one image) the rest is as long for another image."""
    files = [codec.encode(each, 30) for each in (image, image.resize((96, 96), box=(0, 0, 30, 30)))]
    headers = [len(file) - codec.coded(file) for file in files]
    assert abs(headers[0] - headers[1]) <= 2
    assert 0 < headers[0] < 700
    assert abs(len(files[0]) - len(files[1])) > 50


def test_a_curve_is_read_between_its_points_only() -> None:
    line = [Point(0.2, 0.1, 20.0), Point(0.4, 0.3, 24.0)]
    assert at_rate(line, 0.3) == pytest.approx(22)
    assert at_rate(line, 0.2, "coded_rate") == pytest.approx(22)
    assert np.isnan(at_rate(line, 0.1))


def test_the_file_is_that_of_the_nearest_size(image: Image.Image) -> None:
    jpeg = CODECS[0]
    sizes = [len(jpeg.encode(image, quality)) for quality in (10, 40, 80)]
    assert [len(nearest_file(jpeg, image, size)) for size in sizes] == sizes


def restored(level: float) -> Restored:
    return Restored(np.zeros((256, 256, 3), np.uint8), level, 0.75, 0.21, 0.203125)


def measured(levels: Sequence[float]) -> Measured:
    images = {view: [restored(level) for level in levels] for view in VIEWS}
    curves = {view: {name: [Point(0.1, 0.05, 20.0), Point(0.31, 0.25, 24.0)] for name in NAMES} for view in VIEWS}
    return Measured("vq-photo", 3, images, images, curves, np.array([4, 4, 4, 4, 0, 0, 0, 0]), 700)


def test_the_figures_are_means() -> None:
    found = figures(measured([24.0, 26.0]))
    assert found == {
        "images": 2, "psnr_resized": 25.0, "ssim_resized": 0.75, "psnr_cut": 25.0, "ssim_cut": 0.75,
        "photos": 700, "perplexity": 4, "codes_used": 0.5,
    }  # fmt: skip


def test_the_document_is_written_between_its_marks() -> None:
    text = document(measured([24.0, 26.0]), ["kodim03", "kodim05"])
    assert "| kodim05 | 26.00 dB | 0.750 | 26.00 dB | 0.750 |" in text
    assert "| **vq-photo, mean** | 25.00 dB | 0.750 | 25.00 dB | 0.750 |" in text
    assert "| WebP, whole file of 0.210 bits per pixel | 22.10 dB | 22.10 dB |" in text
    assert "| WebP, coded data of 0.203 bits per pixel | 23.06 dB | 23.06 dB |" in text
    assert "50.0% of the 8 codes are used, with a perplexity of 4, 50% of the codebook." in text
    page = "before\n<!-- figures: written by recipes/measure_tokenizer.py -->\nold\n<!-- end of figures -->\nafter\n"
    assert MARKS.sub(lambda _: text, page) == page.replace("old\n", text)


def test_an_image_is_sent_without_loss(image: Image.Image) -> None:
    file = encode_png(image)
    assert psnr(decoded(file), np.asarray(image)) == np.inf
    assert Image.open(io.BytesIO(file)).format == "PNG"
