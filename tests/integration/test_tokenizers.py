"""Every tokenizer: exported and verified by the command's own line, then the same round trip through both engines that serve it."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.admission import Ticket
from app.backends.base import Backend
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.backends.triton import TritonBackend
from app.golden import check_golden
from app.main import create_app
from app.manifest import GoldenExample, read_entry
from app.settings import Settings
from app.token_format import MEDIA_TYPE
from export.pipeline import export
from export.spec import Published
from tests import triton
from tests.export.tokenizers import SIZE, TOKENIZERS
from tests.factories import make_image

pytestmark = pytest.mark.triton

NPY = "application/x-npy"


async def round_trip(backend: Backend, paths: tuple[Path, ...], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both engines loaded and tried, then images -> tokens -> images."""
    await backend.start()
    try:
        entries = [read_entry(path) for path in paths]
        for entry in entries:
            await backend.load(entry)
            await check_golden(backend, entry)
        tokens = (await backend.infer(entries[0], {"image": images}, Ticket()))["tokens"]
        return tokens, (await backend.infer(entries[1], {"tokens": tokens}, Ticket()))["image"]
    finally:
        await backend.close()


def check_routes(name: str, paths: tuple[Path, ...], **settings: Any) -> None:
    """Over HTTP: golden images give golden tokens, golden tokens give golden pixels, and the container leads there too."""
    tokenize, detokenize = (read_entry(path) for path in paths)
    options = {"default_classify": "none", "preload": False, "repository_poll": 0} | settings
    with TestClient(create_app(Settings(_env_file=None, repository=tokenize.path.parents[1], **options))) as client:

        def ask(task: str, body: bytes, form: str) -> bytes:
            response = client.post(f"/v1/{task}?model={name}", content=body, headers={"Accept": form})
            assert (response.status_code, response.headers["Content-Type"]) == (200, form), response.text
            return response.content

        for example in tokenize.manifest.golden:
            photo = (tokenize.path / str(example.image)).read_bytes()
            agree(ask("tokenize", photo, NPY), tokenize.path, example, "tokens")
            there_and_back = ask("detokenize", ask("tokenize", photo, MEDIA_TYPE), NPY)
            assert np.array_equal(load(there_and_back), load(ask("reconstruct", photo, NPY)))
        for example in detokenize.manifest.golden:
            with np.load(detokenize.path / str(example.inputs)) as inputs:
                body = BytesIO()
                np.save(body, inputs["tokens"])
            agree(ask("detokenize", body.getvalue(), NPY), detokenize.path, example, "image")
        assert tokenize.manifest.golden
        assert detokenize.manifest.golden


def load(content: bytes) -> np.ndarray:
    return np.load(BytesIO(content), allow_pickle=False)


def agree(content: bytes, directory: Path, example: GoldenExample, name: str) -> None:
    with np.load(directory / example.outputs) as outputs:
        difference = np.abs(load(content).astype(np.int64) - outputs[name])
    assert np.mean(difference > example.tolerance) <= example.outliers


@pytest.fixture(params=TOKENIZERS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Published:
    return export(TOKENIZERS[request.param].request(tmp_path), lambda stage: None)


@pytest.mark.anyio
async def test_export_verify_serve(published: Published) -> None:
    name, repository = published.name, published.path.parents[1]
    records = [read_entry(path).manifest for path in published.paths]
    assert [manifest.role for manifest in records] == ["tokenize", "detokenize"]
    assert all(manifest.verification is not None and manifest.verification.passed for manifest in records)
    assert len({(manifest.build, manifest.codebook) for manifest in records}) == 1
    settings = Settings(_env_file=None, repository=repository, default_classify="none", preload=False, repository_poll=0)
    with TestClient(create_app(settings)) as client:
        (row,) = client.get("/v1/models").json()["data"]
    assert (row["id"], row["task"], row["problems"]) == (name, "tokenize", [])
    images = np.stack([np.asarray(make_image(SIZE, SIZE, seed)) for seed in range(3)])
    embedded = await round_trip(OnnxRuntimeBackend(), published.paths, images)
    check_routes(name, published.paths)
    with triton.serve(repository) as server:
        backend = TritonBackend(f"127.0.0.1:{server.ports.grpc}")
        remote = await round_trip(backend, published.paths, images)
        check_routes(name, published.paths, backend="triton", triton_url=f"127.0.0.1:{server.ports.grpc}")
    assert np.mean(embedded[0] == remote[0]) >= 0.999
    assert np.mean(np.abs(embedded[1].astype(int) - remote[1]) > 1) <= 0.001
    assert embedded[1].shape == images.shape
    assert len(np.unique(embedded[0])) >= 20
