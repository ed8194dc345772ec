"""A dual encoder behind a real Triton answers as the embedded engine does: vectors, similarities, labels and OpenAI's shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests import triton
from tests.app.api.test_embed import BLUE, LABELS, RED
from tests.dual_repository import add_dual_encoder

pytestmark = pytest.mark.triton


@contextmanager
def serving(repository: Path, **settings: Any) -> Iterator[TestClient]:
    options = {"repository": repository, "default_embed": "colour-clip", "preload": False, "repository_poll": 0} | settings
    with TestClient(create_app(Settings(_env_file=None, **options))) as client:
        yield client


def answers(client: TestClient) -> list[Any]:
    """Every number that the routes give for two images and three texts."""
    files = [("image", RED), ("image", BLUE)]
    embedded = client.post("/v1/embed", files=files, data={"texts": LABELS}).json()["results"]
    compared = client.post("/v1/similarity", files=files, params={"texts": LABELS}).json()["results"]
    classified = client.post("/v1/classify", content=RED, params={"labels": LABELS}).json()["results"][0]["predictions"]
    openai = client.post("/v1/embeddings", json={"input": LABELS}).json()["data"]
    vectors = [row["embedding"] for row in (*embedded, *openai)]
    return [vectors, [row["probabilities"] for row in compared], [one["score"] for one in classified]]


def test_triton_answers_as_the_embedded_engine(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    add_dual_encoder(repository)
    with serving(repository) as client:
        embedded = answers(client)
    with (
        triton.serve(repository) as server,
        serving(repository, backend="triton", triton_url=f"127.0.0.1:{server.ports.grpc}") as client,
    ):
        remote = answers(client)
    for ours, theirs in zip(embedded, remote, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
