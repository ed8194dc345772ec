"""What a client likes best of what a route offers."""

import pytest

from app.api.accept import choose

OFFERS = ("application/json", "image/png", "image/jpeg", "image/webp", "application/x-npy")
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("IMAGE/JPEG ; q=1.0", "image/jpeg"),
        ("image/png;q=0.5, image/webp", "image/webp"),
        ("image/png;q=0.5, image/webp;q=0.8, */*;q=0.1", "image/webp"),
        ("image/webp, image/png", "image/webp"),
        ("*/*, image/webp", "image/webp"),
        ("image/*, image/png;q=0", "image/jpeg"),
        ("image/*;q=0.2, image/png;q=0.1, application/json;q=0.1", "image/jpeg"),
        ("application/*", "application/json"),
        ("image/jpeg;level=1", "image/jpeg"),
        ("image/jpeg;q=no, image/png;q=0.3", "image/png"),
        (" , image/jpeg,", "image/jpeg"),
        (BROWSER, "image/webp"),
        ("text/html", None),
        ("image/avif", None),
        ("image/png;q=0", None),
        ("*/*;q=0", None),
        ("*/*;q=0, image/png", "image/png"),
    ],
)
def test_choose(accept: str, chosen: str | None) -> None:
    assert choose(accept, OFFERS) == chosen
