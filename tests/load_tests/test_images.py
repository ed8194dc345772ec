"""The test images have the sizes that the tables name, and are the same every time."""

from pathlib import Path

import pytest
from PIL import Image

from load_tests.images import PHOTOS, make


@pytest.mark.parametrize("name", ["500x334", "png"])
def test_sizes(name: str, tmp_path: Path) -> None:
    photo, path = PHOTOS[name], tmp_path / PHOTOS[name].file
    make(photo, path)
    with Image.open(path) as image:
        assert image.size == (photo.width, photo.height) == (500, 334)
        assert Image.MIME[str(image.format)] == photo.content_type


def test_the_usual_photo_has_57_kb(tmp_path: Path) -> None:
    make(PHOTOS["500x334"], tmp_path / "a.jpg")
    make(PHOTOS["500x334"], tmp_path / "b.jpg")
    assert (tmp_path / "a.jpg").stat().st_size == pytest.approx(57_000, rel=0.03)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_an_enlarged_photo_has_grain(tmp_path: Path) -> None:
    photo = PHOTOS["1920x1281"]
    make(photo, tmp_path / photo.file)
    size = (tmp_path / photo.file).stat().st_size
    assert size == pytest.approx(photo.bytes, rel=0.1)
    with Image.open(tmp_path / photo.file) as image:
        assert image.size == (1920, 1281)


def test_the_largest_is_a_12_megapixel_photo() -> None:
    assert PHOTOS["12mp"].width * PHOTOS["12mp"].height == 12_000_000
