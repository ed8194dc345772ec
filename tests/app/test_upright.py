"""What goes on to another server: the same bytes, or the same picture upright in a format that every server reads."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.decode import DecodeLimits, decode, open_image
from app.upright import UprightFile, upright_file
from tests.factories import encode, make_image, make_jpeg, make_png


def upright(content: bytes) -> UprightFile:
    image, info = decode(open_image(content, DecodeLimits()))
    return upright_file(content, image, info)


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (make_jpeg(60, 40), "image/jpeg"),
        (make_jpeg(60, 40, orientation=1), "image/jpeg"),
        (make_png(60, 40), "image/png"),
        (encode(make_image(60, 40), "WEBP"), "image/webp"),
        (encode(make_image(60, 40), "GIF"), "image/gif"),
    ],
)
def test_what_is_upright_already_keeps_its_bytes(content: bytes, media_type: str) -> None:
    assert upright(content) == UprightFile(content, media_type, 60, 40)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_jpeg_is_written_anew(orientation: int) -> None:
    content = make_jpeg(60, 40, orientation=orientation)
    file = upright(content)
    expected, _ = decode(open_image(content, DecodeLimits()))
    with Image.open(BytesIO(file.content)) as written:
        assert file.media_type == "image/jpeg"
        assert written.getexif().get(0x0112, 1) == 1
        assert written.size == expected.size == (file.width, file.height)
        assert np.abs(np.asarray(written, np.int16) - np.asarray(expected, np.int16)).mean() < 2


def test_rare_formats_and_films_become_a_still_png() -> None:
    film = encode(make_image(20, 10), "GIF", save_all=True, append_images=[make_image(20, 10, seed=1)])
    for content in (encode(make_image(20, 10), "TIFF"), encode(make_image(20, 10), "BMP"), film):
        file = upright(content)
        expected, _ = decode(open_image(content, DecodeLimits()))
        with Image.open(BytesIO(file.content)) as written:
            assert (file.media_type, written.format, getattr(written, "n_frames", 1)) == ("image/png", "PNG", 1)
            assert np.array_equal(np.asarray(written), np.asarray(expected))
