"""Every tokenizer: exported and verified by the command's own line, then the same round trip through both engines that serve it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.admission import Ticket
from app.backends.base import Backend
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.backends.triton import TritonBackend
from app.golden import check_golden
from app.main import create_app
from app.manifest import read_entry
from app.settings import Settings
from export.pipeline import export
from tests import triton
from tests.export.tokenizers import SIZE, TOKENIZERS
from tests.factories import make_image

pytestmark = pytest.mark.triton


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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_export_verify_serve(name: str, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    published = export(TOKENIZERS[name].request(tmp_path), lambda stage: None)
    records = [read_entry(path).manifest for path in published.paths]
    assert [manifest.role for manifest in records] == ["tokenize", "detokenize"]
    assert all(manifest.verification is not None and manifest.verification.passed for manifest in records)
    assert len({(manifest.build, manifest.codebook) for manifest in records}) == 1
    settings = Settings(_env_file=None, repository=repository, default_classify="none", preload=False, repository_poll=0)
    with TestClient(create_app(settings)) as client:
        (row,) = client.get("/v1/models").json()["data"]
    assert (row["id"], row["task"], row["problems"]) == (name.replace("_", "-"), "tokenize", [])
    images = np.stack([np.asarray(make_image(SIZE, SIZE, seed)) for seed in range(3)])
    embedded = asyncio.run(round_trip(OnnxRuntimeBackend(), published.paths, images))
    with triton.serve(repository) as server:
        backend = TritonBackend(f"127.0.0.1:{server.ports.grpc}")
        remote = asyncio.run(round_trip(backend, published.paths, images))
    assert np.mean(embedded[0] == remote[0]) >= 0.999
    assert np.mean(np.abs(embedded[1].astype(int) - remote[1]) > 1) <= 0.001
    assert embedded[1].shape == images.shape
    assert len(np.unique(embedded[0])) >= 20
