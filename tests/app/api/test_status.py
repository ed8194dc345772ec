"""The files of the pages as they are served."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.api.pages import STATIC

KINDS = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html", ".txt": "text/plain"}


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.iterdir()))
def test_files_have_their_type_and_are_sent_once(client: TestClient, name: str) -> None:
    response = client.get(f"/status/assets/{name}")
    assert response.status_code == 200
    assert response.content == (STATIC / name).read_bytes()
    assert KINDS[Path(name).suffix] in response.headers["content-type"]
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    again = client.get(f"/status/assets/{name}", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["nothing.js", "..%2fstatus.py", "%2e%2e/status.py"])
def test_there_is_no_way_to_other_files(client: TestClient, path: str) -> None:
    response = client.get(f"/status/assets/{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_the_vendored_library_brings_its_licence() -> None:
    assert "MIT License" in (STATIC / "uplot.LICENSE.txt").read_text()
    assert "uPlot (v1.6.32)" in (STATIC / "uplot.iife.min.js").read_text()
