"""Two real Tritons behind one gateway backend: one is killed and comes back, and nobody notices."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.admission import Ticket
from app.backends.several import SeveralTritons
from app.backends.triton import TritonBackend
from app.errors import BackendUnavailableError, DeadlineError
from app.local_triton import LocalTriton
from app.manifest import Entry, read_entry
from tests import triton
from tests.factories import encode
from tests.gateway import gateway
from tests.repository import NAME, add_entry, make_images, reference

pytestmark = [pytest.mark.triton, pytest.mark.anyio]

IMAGES = make_images(3)
RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalTriton, LocalTriton]]:
    """Two servers of one repository each, alike."""
    with ExitStack() as stack:
        started = []
        for number in (1, 2):
            repository = tmp_path_factory.mktemp(f"server{number}") / "repository"
            add_entry(repository)
            started.append(stack.enter_context(triton.serve(repository)))
        yield started[0], started[1]


async def infer(backend: SeveralTritons, entry: Entry, seconds: float = 10.0) -> None:
    outputs = await backend.infer(entry, {"image": IMAGES}, Ticket(deadline=time.monotonic() + seconds))
    np.testing.assert_allclose(outputs["probabilities"], reference(IMAGES, entry.version), atol=1e-5)


async def answered(backend: TritonBackend, entry: Entry) -> int:
    stats = await backend._client.get_inference_statistics(entry.name, str(entry.version))
    return int(stats.model_stats[0].inference_count)


async def test_one_of_two_dies_under_load_and_comes_back(servers: tuple[LocalTriton, LocalTriton]) -> None:
    entry = read_entry(servers[0].repository / NAME / "1")
    backend = SeveralTritons([TritonBackend(server.url) for server in servers])
    await backend.start()
    try:
        await backend.load(entry)
        await asyncio.gather(*(infer(backend, entry) for _ in range(40)))
        assert min([await answered(one, entry) for one in backend.servers]) > 20, "both have work"

        failed: list[BaseException] = []
        stop = asyncio.Event()

        async def ask() -> int:
            count = 0
            while not stop.is_set():
                try:
                    await infer(backend, entry)
                    count += 1
                except Exception as error:  # told below
                    failed.append(error)
            return count

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        await asyncio.sleep(0.3)
        victim = servers[1]
        assert victim.process is not None
        victim.process.kill()
        victim.stop()
        while not backend.servers[1].breaker.open:
            await asyncio.sleep(0.01)
        assert backend.troubles() == [f"Triton does not answer at {victim.url}"]
        assert await backend.fault() is None, "the other one computes"
        before = await answered(backend.servers[0], entry)
        await asyncio.sleep(0.5)
        assert await answered(backend.servers[0], entry) > before

        victim.start()
        await asyncio.to_thread(victim.wait_ready)
        returned = time.monotonic()
        while backend.troubles():
            assert time.monotonic() < returned + 2
            await asyncio.sleep(0.01)
        while await answered(backend.servers[1], entry) < 5:
            assert time.monotonic() < returned + 5
            await asyncio.sleep(0.05)
        stop.set()
        assert sum(await asyncio.gather(*asking)) > 10
        assert not failed
    finally:
        await backend.close()


async def test_a_hung_server_costs_a_deadline_and_then_nothing(servers: tuple[LocalTriton, LocalTriton]) -> None:
    entry = read_entry(servers[0].repository / NAME / "1")
    hung = servers[1]
    assert hung.process is not None
    backend = SeveralTritons([TritonBackend(server.url) for server in servers])
    await backend.start()
    try:
        await backend.load(entry)
        os.killpg(hung.process.pid, signal.SIGSTOP)
        try:
            outcomes = await asyncio.gather(*(infer(backend, entry, 0.5) for _ in range(8)), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {type(None), DeadlineError}, "what may be computed is not repeated"
            end = time.monotonic() + 5
            while not backend.troubles():
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            await asyncio.gather(*(infer(backend, entry, 5) for _ in range(20)))
        finally:
            os.killpg(hung.process.pid, signal.SIGCONT)
        end = time.monotonic() + 5
        while backend.troubles():
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
    finally:
        await backend.close()


async def test_a_server_without_the_model_is_passed_over_and_mended(servers: tuple[LocalTriton, LocalTriton]) -> None:
    entry = read_entry(servers[0].repository / NAME / "1")
    backend = SeveralTritons([TritonBackend(server.url) for server in servers])
    await backend.start()
    try:
        await backend.load(entry)
        await backend.servers[1]._client.unload_model(NAME)
        while await backend.servers[1]._client.is_model_ready(NAME, "1"):
            await asyncio.sleep(0.01)
        end = time.monotonic() + 10
        while not await backend.servers[1]._client.is_model_ready(NAME, "1"):
            await infer(backend, entry)
            assert time.monotonic() < end
        assert backend.troubles() == []
        before = await answered(backend.servers[1], entry)
        await asyncio.gather(*(infer(backend, entry) for _ in range(10)))
        assert await answered(backend.servers[1], entry) > before
    finally:
        await backend.close()


async def test_the_gateway_says_who_is_away(servers: tuple[LocalTriton, LocalTriton]) -> None:
    addresses = ",".join(server.url for server in servers)
    with gateway(servers[0].repository, backend="triton", triton_url=addresses, default_classify=NAME) as url:
        assert httpx2.get(f"{url}/readyz").json()["troubles"] == []
        victim = servers[1]
        assert victim.process is not None
        victim.process.kill()
        victim.stop()
        for _ in range(20):
            assert httpx2.post(f"{url}/v1/classify", content=RED).status_code == 200
        health = httpx2.get(f"{url}/readyz")
        assert (health.status_code, health.json()["troubles"]) == (200, [f"Triton does not answer at {victim.url}"])
        assert f'vitrine_circuit_open{{address="{victim.url}"}} 1.0' in httpx2.get(f"{url}/metrics").text
        other = servers[0]
        assert other.process is not None
        other.process.kill()
        other.stop()
        end = time.monotonic() + 10
        while (answer := httpx2.post(f"{url}/v1/classify", content=RED)).status_code == 200:
            assert time.monotonic() < end
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert httpx2.get(f"{url}/readyz").status_code == 503


async def test_all_are_needed_to_load_nothing(tmp_path: Path) -> None:
    """With every server away a load says so, and with one of them it does not."""
    entry = add_entry(tmp_path)
    backend = SeveralTritons([TritonBackend("127.0.0.1:1", shared_memory="off"), TritonBackend("127.0.0.1:2", shared_memory="off")])
    await backend.start()
    try:
        with pytest.raises(BackendUnavailableError):
            await backend.load(entry)
    finally:
        await backend.close()
