from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.decode import DecodeLimits, decode, open_image
from export.golden import golden_images, travelling


def test_they_are_the_same_in_every_run() -> None:
    again = golden_images.__wrapped__()
    assert [image.data for image in again] == [image.data for image in golden_images()]


def test_they_cover_formats_sizes_and_orientations() -> None:
    opened = [Image.open(BytesIO(image.data)) for image in golden_images()]
    assert {image.format for image in opened} == {"JPEG", "PNG"}
    assert {image.getexif().get(0x0112, 1) for image in opened} == {1, 6, 8}
    assert any(image.width > image.height for image in opened)
    assert any(image.width < image.height for image in opened)
    assert max(image.width for image in opened if image.format == "JPEG") >= 1600


def test_a_large_jpeg_is_one_that_scaled_decoding_concerns() -> None:
    image = next(image for image in golden_images() if image.name == "large.jpg")
    _, info = decode(open_image(image.data, DecodeLimits(), lambda width, height: (256, 256)))
    assert info.scaled > 1


def test_those_that_travel_are_few_and_small() -> None:
    sizes = [len(image.data) for image in travelling()]
    assert 2 <= len(sizes) <= 3
    assert sum(sizes) <= 60_000


@pytest.mark.parametrize("image", golden_images(), ids=lambda image: image.name)
def test_every_image_shows_colour_and_detail(image) -> None:
    pixels = np.asarray(Image.open(BytesIO(image.data)).convert("RGB")).astype(float)
    assert pixels.std() > 20
    assert np.abs(pixels - pixels[..., ::-1]).mean() > 10
    assert np.abs(np.diff(pixels, axis=1)).mean() > 0.5
