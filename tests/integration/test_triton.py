"""A real Triton that comes, goes, hangs and learns new versions, seen through the backend."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.admission import Ticket
from app.backends.triton import TritonBackend
from app.errors import BackendUnavailableError, DeadlineError, InferenceError
from app.local_triton import LocalTriton, free_ports
from app.manifest import Entry, TensorSpec, read_entry
from tests import triton
from tests.repository import MAX_BATCH, POISON, add_entry, make_images, reference

pytestmark = [pytest.mark.triton, pytest.mark.anyio]

IMAGES = make_images(3)
LINGER = 500_000  # microseconds: calls made at once share a batch, which starts when it is full


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A server that is left as it is; every test publishes models of its own there."""
    repository = tmp_path_factory.mktemp("shared") / "repository"
    repository.mkdir()
    with triton.serve(repository) as server:
        yield server


@pytest.fixture
async def backend(shared: LocalTriton) -> AsyncIterator[TritonBackend]:
    async with connected(shared) as backend:
        yield backend


@pytest.fixture
def entry(shared: LocalTriton, request: pytest.FixtureRequest) -> Entry:
    """The first version of a model of this test alone."""
    return add_entry(shared.repository, request.function.__name__.removeprefix("test_"))


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[LocalTriton]:
    """A server for this test alone, to be killed; it serves `colours` and `slow`."""
    repository = tmp_path / "repository"
    add_entry(repository)
    add_entry(repository, "slow", delay=512)
    with triton.serve(repository) as server:
        yield server


@asynccontextmanager
async def connected(server: LocalTriton, **options: Any) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(server.url, **options)
    await backend.start()
    yield backend
    await backend.close()


async def check(backend: TritonBackend, entry: Entry, seconds: float = 10.0) -> None:
    """One inference comes back right."""
    outputs = await backend.infer(entry, {"image": IMAGES}, Ticket(deadline=time.monotonic() + seconds))
    np.testing.assert_allclose(outputs["probabilities"], reference(IMAGES, entry.version), atol=1e-5)


async def check_within(backend: TritonBackend, entry: Entry, seconds: float) -> None:
    """An inference comes back right before so many seconds are over."""
    end = time.monotonic() + seconds
    while True:
        try:
            return await check(backend, entry)
        except BackendUnavailableError:
            assert time.monotonic() < end
            await asyncio.sleep(0.1)


async def statistics(backend: TritonBackend, entry: Entry) -> Any:
    return (await backend._client.get_inference_statistics(entry.name, str(entry.version))).model_stats[0]


async def check_batches(backend: TritonBackend, entry: Entry, expected: dict[int, int]) -> None:
    """So often Triton ran each size of batch. It counts a batch only after the answers have left."""
    end = time.monotonic() + 2
    while True:
        told = {each.batch_size: each.compute_infer.count for each in (await statistics(backend, entry)).batch_stats}
        if told == expected:
            return
        assert time.monotonic() < end, told
        await asyncio.sleep(0.05)


def shared_memory(server: LocalTriton) -> list[Path]:
    """The files through which the server talks with the processes of its models."""
    return list(Path("/dev/shm").glob(f"vitrine_{os.getpid()}_{server.ports.grpc}_*"))


async def test_a_killed_server_is_unavailable_and_a_restarted_one_is_found_again(fragile: LocalTriton) -> None:
    entry, slow = (read_entry(fragile.repository / name / "1") for name in ("colours", "slow"))
    assert fragile.process is not None
    async with connected(fragile) as backend:
        await check(backend, entry)
        assert shared_memory(fragile)
        pending = asyncio.create_task(backend.infer(slow, {"image": IMAGES}, Ticket()))
        await asyncio.sleep(0.02)
        fragile.process.kill()
        with pytest.raises(BackendUnavailableError):
            await pending
        fragile.stop()
        assert not shared_memory(fragile)
        started = time.monotonic()
        with pytest.raises(BackendUnavailableError):
            await check(backend, entry)
        assert "does not answer" in (await backend.fault() or "")
        assert time.monotonic() - started < 2

        fragile.start()
        await asyncio.to_thread(fragile.wait_ready)
        await check_within(backend, entry, 3)
        assert await backend.fault() is None


async def test_a_server_that_hangs_costs_no_more_than_the_deadline(fragile: LocalTriton) -> None:
    entry = read_entry(fragile.repository / "colours" / "1")
    assert fragile.process is not None
    async with connected(fragile) as backend:
        await check(backend, entry)
        os.killpg(fragile.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                await check(backend, entry, seconds=0.3)
            assert 0.25 < time.monotonic() - started < 1
            assert "does not answer" in (await backend.fault() or "")
            assert time.monotonic() - started < 3
        finally:
            os.killpg(fragile.process.pid, signal.SIGCONT)
        await check_within(backend, entry, 3)


async def test_a_version_published_later_becomes_servable(backend: TritonBackend, shared: LocalTriton, entry: Entry) -> None:
    await backend.load(entry)
    second = add_entry(shared.repository, entry.name, version=2)
    with pytest.raises(BackendUnavailableError, match="ready"):
        await check(backend, second)
    loading = asyncio.create_task(backend.load(second))
    answered = 0
    while not loading.done():  # the first version goes on answering meanwhile
        await check(backend, entry)
        answered += 1
    await loading
    assert answered > 0
    await check(backend, second)
    await check(backend, entry)


async def test_the_version_policy_drops_the_oldest(backend: TritonBackend, shared: LocalTriton, entry: Entry) -> None:
    for version in (2, 3):
        await backend.load(add_entry(shared.repository, entry.name, version=version))
    with pytest.raises(BackendUnavailableError, match=str(entry)):
        await check(backend, entry)
    await check(backend, replace(entry, version=2))
    await check(backend, replace(entry, version=3))


async def test_a_broken_version_leaves_the_good_one_serving(backend: TritonBackend, shared: LocalTriton, entry: Entry) -> None:
    await backend.load(entry)
    broken = add_entry(shared.repository, entry.name, version=2)
    broken.engine_file.write_bytes(b"not an engine")
    with pytest.raises(InferenceError, match=str(broken)):
        await backend.load(broken)
    await check(backend, entry)


async def test_an_engine_with_other_tensors_than_its_manifest_is_not_loaded(backend: TritonBackend, entry: Entry) -> None:
    wider = TensorSpec(name="probabilities", dtype="float32", shape=(-1, 7))
    other = replace(entry, manifest=entry.manifest.model_copy(update={"outputs": (wider,)}))
    with pytest.raises(InferenceError, match="manifest"):
        await backend.load(other)


async def merged(backend: TritonBackend, entry: Entry, poisoned: int) -> list[Any]:
    """What calls of one image come to that together fill one batch of Triton, which fails on the image `poisoned`."""
    images = make_images(MAX_BATCH)
    images[poisoned, 0, 0, 0] = POISON
    calls = (backend.infer(entry, {"image": image[None]}, Ticket()) for image in images)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for row, (image, answer) in enumerate(zip(images, answers, strict=True)):
        if row != poisoned:
            assert isinstance(answer, dict), answer
            np.testing.assert_allclose(answer["probabilities"], reference(image[None]), atol=1e-5)
    return answers


async def test_a_poisoned_input_of_a_merged_batch_fails_alone(backend: TritonBackend, shared: LocalTriton) -> None:
    entry = add_entry(shared.repository, "retried_there", poison=True, linger=LINGER)
    await backend.load(entry)
    answers = await merged(backend, entry, poisoned=5)
    assert isinstance(answers[5], InferenceError)
    await check_batches(backend, entry, {MAX_BATCH: 1})  # this side asked for nothing twice


async def test_calls_that_fell_with_another_are_repeated_alone(backend: TritonBackend, shared: LocalTriton) -> None:
    entry = add_entry(shared.repository, "retried_here", poison=True, linger=LINGER, backend="python")
    shutil.copy(Path(__file__).with_name("one_for_all.py"), entry.path / "model.py")
    await backend.load(entry)
    answers = await merged(backend, entry, poisoned=5)
    assert isinstance(answers[5], InferenceError)
    await check_batches(backend, entry, {MAX_BATCH: 1 + MAX_BATCH})


async def test_what_nobody_waits_for_any_more_is_not_computed(backend: TritonBackend, shared: LocalTriton) -> None:
    slow = add_entry(shared.repository, "abandoned", delay=512, max_batch=1)
    await backend.load(slow)
    calls = [asyncio.create_task(backend.infer(slow, {"image": IMAGES[:1]}, Ticket())) for _ in range(10)]
    await asyncio.sleep(0.1)
    for call in calls:
        call.cancel()
    for call in calls:
        with contextlib.suppress(asyncio.CancelledError):
            await call
    await backend.infer(slow, {"image": IMAGES[:1]}, Ticket())
    assert (await statistics(backend, slow)).inference_count < 8


@pytest.mark.parametrize("way", ["cancelled", "expired"])
async def test_a_call_that_leaves_tritons_queue_is_not_executed(backend: TritonBackend, shared: LocalTriton, way: str) -> None:
    entry = add_entry(shared.repository, way, linger=LINGER)
    await backend.load(entry)
    deadline = time.monotonic() + (0.1 if way == "expired" else 10)
    leaving = [asyncio.create_task(backend.infer(entry, {"image": IMAGES[:1]}, Ticket(deadline=deadline))) for _ in range(3)]
    staying = asyncio.create_task(backend.infer(entry, {"image": IMAGES}, Ticket()))
    await asyncio.sleep(0.1)
    for call in leaving:
        if way == "cancelled":
            call.cancel()
        with pytest.raises((asyncio.CancelledError, DeadlineError)):
            await call
    await staying
    await check_batches(backend, entry, {len(IMAGES): 1})


async def test_no_more_calls_are_in_flight_than_allowed(shared: LocalTriton) -> None:
    slow = add_entry(shared.repository, "bounded", delay=256)
    async with connected(shared, concurrency=2) as backend:
        await backend.load(slow)
        tickets = [Ticket() for _ in range(8)]
        await asyncio.gather(*(backend.infer(slow, {"image": IMAGES}, ticket) for ticket in tickets))
        assert max(ticket.stages["queue"] for ticket in tickets) > 0.05
        late = [Ticket(deadline=time.monotonic() + 0.05) for _ in range(8)]
        calls = (backend.infer(slow, {"image": IMAGES}, ticket) for ticket in late)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert any(isinstance(outcome, DeadlineError) for outcome in outcomes)
        await backend.infer(slow, {"image": IMAGES}, Ticket())  # the places of those that gave up are free again


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], LocalTriton]]:
    """`app.local_triton.run` in a process of its own, and a view of its server, which serves `colours`."""
    add_entry(tmp_path)
    server = LocalTriton(tmp_path, free_ports(), triton.require())
    ports = f"{server.ports.http}, {server.ports.grpc}, {server.ports.metrics}"
    code = f"from pathlib import Path; from app.local_triton import run; exit(run(Path({str(tmp_path)!r}), {ports}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=triton.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield process, server
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_run_serves_until_it_is_told_to_stop(
    command: tuple[subprocess.Popen[bytes], LocalTriton], number: signal.Signals
) -> None:
    process, server = command
    end = time.monotonic() + 60
    while not server.answers():
        assert process.poll() is None
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    async with connected(server) as backend:
        await check(backend, read_entry(server.repository / "colours" / "1"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output.decode()
    assert not server.answers()


async def test_a_killed_server_leaves_no_process_of_its_models(tmp_path: Path) -> None:
    add_entry(tmp_path / "repository")
    with triton.serve(tmp_path / "repository") as server:
        assert server.process is not None
        group = server.process.pid
        assert len(alive(group)) > 1  # the server and at least one model
        server.process.kill()
    until = time.monotonic() + 5
    while alive(group):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


def alive(group: int) -> list[str]:
    """The processes of a group, those that only wait to be reaped left out."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(file.parent.name)
    return found
