"""Every family: exported and verified by the command's own line, then served by both engines from one repository."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.local_triton import LocalTriton
from app.main import create_app
from app.settings import Settings
from export.pipeline import export
from export.spec import ExportRequest
from tests import triton
from tests.export.families import FAMILIES
from tests.factories import make_jpeg

pytestmark = pytest.mark.triton

PHOTOS = [make_jpeg(500, 334), make_jpeg(1300, 900, 1), make_jpeg(200, 300, 2, orientation=6)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families") / "repository"
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[LocalTriton]:
    with triton.serve(repository) as server:
        yield server


def gateway(repository: Path, **settings: str) -> TestClient:
    options = {"repository": repository, "default_classify": "none", "preload": False, "repository_poll": 0}
    return TestClient(create_app(Settings(_env_file=None, **options | settings)))


@pytest.fixture(scope="module")
def gateways(repository: Path, server: LocalTriton) -> Iterator[tuple[TestClient, TestClient]]:
    address = f"127.0.0.1:{server.ports.grpc}"
    with gateway(repository) as embedded, gateway(repository, backend="triton", triton_url=address) as remote:
        yield embedded, remote


@pytest.mark.parametrize("name", FAMILIES)
def test_export_verify_serve(name: str, repository: Path, gateways: tuple[TestClient, TestClient], tmp_path: Path) -> None:
    request: ExportRequest = replace(FAMILIES[name].narrow.request(tmp_path), repository=repository, name=name.replace("_", "-"))
    published = export(request, lambda stage: None)
    assert published.manifest.verification is not None
    assert published.manifest.verification.passed
    answers = []
    for client in gateways:
        listed = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
        assert listed[published.name]["problems"] == []
        response = client.post(f"/v1/classify?model={published.name}", files=[("image", photo) for photo in PHOTOS])
        assert response.status_code == 200, response.text
        answers.append(response.json()["results"])
    for embedded, remote in zip(*answers, strict=True):
        scores = [{p["class_id"]: p["score"] for p in result["predictions"]} for result in (embedded, remote)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert len({result["predictions"][0]["score"] for result in answers[0]}) == len(PHOTOS)
