"""Inputs that go to a real Triton through shared memory: used, mended after a restart, and nothing left behind."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from app.admission import Ticket
from app.backends import shared_memory
from app.backends.triton import TritonBackend
from app.errors import BackendUnavailableError
from app.local_triton import LocalTriton
from app.manifest import Entry, read_entry
from tests import triton
from tests.repository import MAX_BATCH, add_echo, add_entry, make_images, reference

pytestmark = [pytest.mark.triton, pytest.mark.anyio]

IMAGES = make_images(24)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """It serves `colours` and `slow`."""
    repository = tmp_path_factory.mktemp("sharing") / "repository"
    add_entry(repository)
    add_entry(repository, "slow", delay=512)
    add_echo(repository)
    with triton.serve(repository) as server:
        yield server


@pytest.fixture
def entry(server: LocalTriton) -> Entry:
    return read(server, "colours")


def read(server: LocalTriton, name: str) -> Entry:
    return read_entry(server.repository / name / "1")


@asynccontextmanager
async def connected(server: LocalTriton) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(server.url, shared_memory="on")
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def check(backend: TritonBackend, entry: Entry) -> None:
    """Calls of one image, all at once, come back right."""
    calls = (backend.infer(entry, {"image": image[None]}, Ticket()) for image in IMAGES)
    answers = [answer["probabilities"] for answer in await asyncio.gather(*calls)]
    np.testing.assert_allclose(np.concatenate(answers), reference(IMAGES), atol=1e-5)


async def registered(backend: TritonBackend) -> int:
    return len((await backend._client.get_system_shared_memory_status()).regions)


def files() -> set[str]:
    return {file.name for file in shared_memory.DIRECTORY.glob("vitrine-inputs-*")}


async def test_regions_are_made_once_and_let_go_at_the_end(server: LocalTriton, entry: Entry) -> None:
    async with connected(server) as watching:
        async with connected(server) as backend:
            await check(backend, entry)
            count = await registered(watching)
            assert 1 <= count <= len(IMAGES)
            await check(backend, entry)
            assert await registered(watching) == count
            assert not files()
        assert await registered(watching) == 0


async def test_inputs_of_several_tensors_share_a_region(server: LocalTriton) -> None:
    echo = read(server, "echo")
    inputs = {spec.name: np.array([[1, 2], [3, 100], [5, 6]], spec.dtype) for spec in echo.manifest.inputs}
    async with connected(server) as backend:
        outputs = await backend.infer(echo, inputs, Ticket())
        assert await registered(backend) == 1
    for name, array in inputs.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"], array)


async def test_the_region_of_an_abandoned_call_serves_the_next(server: LocalTriton) -> None:
    slow = read(server, "slow")
    async with connected(server) as backend:
        for _ in range(3):
            calls = [asyncio.create_task(backend.infer(slow, {"image": IMAGES[:MAX_BATCH]}, Ticket())) for _ in range(2)]
            await asyncio.sleep(0.05)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert await registered(backend) == 2
        answer = await backend.infer(slow, {"image": IMAGES[:3]}, Ticket())
        np.testing.assert_allclose(answer["probabilities"], reference(IMAGES[:3]), atol=1e-5)


async def test_a_restarted_server_gets_new_regions(tmp_path: Path) -> None:
    entry = add_entry(tmp_path / "repository")
    with triton.serve(tmp_path / "repository") as fragile:
        assert fragile.process is not None
        async with connected(fragile) as backend:
            await check(backend, entry)
            fragile.process.kill()
            fragile.stop()
            with pytest.raises(BackendUnavailableError):
                await check(backend, entry)
            fragile.start()
            await asyncio.to_thread(fragile.wait_ready)
            while await backend.fault() is not None:
                await asyncio.sleep(0.1)
            await check(backend, entry)
            await check(backend, entry)
            assert await registered(backend) >= 1
    assert not files()


async def test_a_server_that_cannot_see_the_memory_is_asked_through_grpc(
    server: LocalTriton, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)
    async with connected(server) as backend:
        await check(backend, entry)
        assert await registered(backend) == 0
        await check(backend, entry)
    assert "cannot be shared" in caplog.text
    assert not files()


async def test_no_more_memory_is_shared_than_allowed(server: LocalTriton, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MAX_BYTES", 3 * shared_memory.SMALLEST)
    async with connected(server) as backend:
        await check(backend, entry)
        assert await registered(backend) == 3


async def test_a_killed_gateway_leaves_no_file(server: LocalTriton, entry: Entry) -> None:
    code = f"""
import asyncio, os, signal
from pathlib import Path
from app.admission import Ticket
from app.backends.triton import TritonBackend
from app.manifest import read_entry
from tests.repository import make_images

async def main():
    backend = TritonBackend({server.url!r}, shared_memory="on")
    await backend.start()
    await backend.infer(read_entry(Path({str(entry.path)!r})), {{"image": make_images(3)}}, Ticket())
    assert len((await backend._client.get_system_shared_memory_status()).regions) == 1
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    process = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], cwd=triton.ROOT, check=False)
    assert process.returncode == -9
    assert not files()
