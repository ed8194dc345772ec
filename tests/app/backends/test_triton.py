"""What the Triton backend does without a server; with one: test_conformance.py and tests/integration/test_triton.py."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import InferenceServerException

from app.admission import Ticket
from app.backends.base import together
from app.backends.triton import (
    TritonBackend,
    blames_the_call,
    check_tensors,
    fill,
    is_here,
    parse_url,
    take_output,
    translate,
    translation,
)
from app.errors import BackendUnavailableError, CapacityError, DeadlineError, InferenceError, VitrineError
from app.local_triton import free_ports
from app.manifest import Entry
from tests.repository import add_entry, make_images


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return add_entry(tmp_path_factory.mktemp("repository"))


@pytest.fixture
async def alone() -> AsyncIterator[TritonBackend]:
    """A backend whose server is away."""
    backend = TritonBackend(f"127.0.0.1:{free_ports().grpc}")
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
async def silent() -> AsyncIterator[TritonBackend]:
    """A backend whose server takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        backend = TritonBackend(f"127.0.0.1:{listener.getsockname()[1]}", shared_memory="off")
        await backend.start()
        yield backend
        await backend.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8001", ("localhost:8001", False)),
        ("grpc://triton.models.svc:8001", ("triton.models.svc:8001", False)),
        ("grpcs://triton.example:443/", ("triton.example:443", True)),
        ("[::1]:8001", ("[::1]:8001", False)),
    ],
)
def test_addresses(url: str, expected: tuple[str, bool]) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8000", "localhost:8001/v2", "localhost:port", ":8001"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="localhost:8001"):
        TritonBackend(url)


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineError),
        ("UNAVAILABLE", "[request id: 7] Exceeds maximum queue size", CapacityError),
        ("UNAVAILABLE", "[request id: 7] Request timeout expired", CapacityError),
        ("RESOURCE_EXHAUSTED", "too many", CapacityError),
        ("UNAVAILABLE", "failed to connect to all addresses", BackendUnavailableError),
        ("UNAVAILABLE", "Request for unknown model: 'colours' version 1 is not at ready state", BackendUnavailableError),
        ("NOT_FOUND", "Request for unknown model: 'colours' version 3 is not found", BackendUnavailableError),
        ("CANCELLED", "CANCELLED", BackendUnavailableError),
        ("UNIMPLEMENTED", "Method not found!", BackendUnavailableError),
        ("INVALID_ARGUMENT", "unexpected shape for input 'image'", InferenceError),
        ("INTERNAL", "Stub process 'colours_0_0' is not healthy.", InferenceError),
        ("UNKNOWN", "", InferenceError),
    ],
)
def test_errors_are_translated(status: str, message: str, expected: type[VitrineError]) -> None:
    error = translate(f"StatusCode.{status}", message, "colours@1")
    assert type(error) is expected
    assert "colours@1" in error.detail


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Request for unknown model: 'talker.decoder' is not found", BackendUnavailableError),
        ("Request for unknown model: 'talker.decoder' has no available versions", BackendUnavailableError),
        ("Request for unknown model: 'talker.decoder' version 1 is not at ready state", BackendUnavailableError),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", BackendUnavailableError),
        ("Exceeds maximum queue size", CapacityError),
        ("unexpected shape for input 'input_ids'", InferenceError),
    ],
)
def test_errors_in_a_stream_have_no_status(message: str, expected: type[VitrineError]) -> None:
    with pytest.raises(expected, match="talker@1"), translation("talker@1"):
        raise InferenceServerException(message)


@pytest.mark.parametrize("target", ["localhost:8001", "127.0.0.1:8001", "127.0.1.1:8001", "[::1]:8001"])
def test_this_machine(target: str) -> None:
    assert is_here(target)


@pytest.mark.parametrize("target", ["triton:8001", "10.0.0.7:8001", "localhost.example:8001", "[2001:db8::1]:8001"])
def test_not_this_machine_for_sure(target: str) -> None:
    assert not is_here(target)


@pytest.mark.parametrize(("status", "blamed"), [("INVALID_ARGUMENT", True), ("INTERNAL", False), ("UNKNOWN", False)])
def test_whose_fault_a_failure_is(status: str, blamed: bool) -> None:
    with pytest.raises(InferenceError) as caught, translation("colours@1"):
        raise InferenceServerException("onnx runtime error 2", f"StatusCode.{status}")
    assert blames_the_call(caught.value) is blamed


def test_an_answer_that_cannot_be_used_is_no_failed_batch(entry: Entry) -> None:
    with pytest.raises(InferenceError) as caught:
        take_output(answer(b""), entry.manifest.outputs[0], 2, entry)
    assert blames_the_call(caught.value)


def test_rows_are_repeated_in_turn() -> None:
    assert fill({"x": np.array([[1], [2], [3]])}, 8)["x"].ravel().tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def answer(content: bytes, shape: tuple[int, ...] = (2, 6), datatype: str = "FP32", name: str = "probabilities") -> InferResult:
    tensor = service_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return InferResult(service_pb2.ModelInferResponse(outputs=[tensor], raw_output_contents=[content]))


def test_an_output_is_taken(entry: Entry) -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    taken = take_output(answer(values.tobytes()), entry.manifest.outputs[0], 2, entry)
    np.testing.assert_array_equal(taken, values)


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(answer(b""), id="empty, with a shape"),
        pytest.param(answer(b"", shape=(0,)), id="empty"),
        pytest.param(answer(bytes(24), shape=(1, 6)), id="too few rows"),
        pytest.param(answer(bytes(72), shape=(3, 6)), id="too many rows"),
        pytest.param(answer(bytes(40), shape=(2, 5)), id="too few classes"),
        pytest.param(answer(bytes(48), shape=(12,)), id="flat"),
        pytest.param(answer(bytes(96), datatype="FP64"), id="dtype"),
        pytest.param(answer(bytes(48), name="logits"), id="another name"),
    ],
)
def test_an_answer_of_another_shape_is_an_error(entry: Entry, result: InferResult) -> None:
    with pytest.raises(InferenceError, match="colours@1"):
        take_output(result, entry.manifest.outputs[0], 2, entry)


@pytest.mark.parametrize("change", [{"name": "picture"}, {"datatype": "FP32"}, {"shape": [-1, 3, 16, 16]}])
def test_the_servers_tensors_are_held_against_the_manifest(entry: Entry, change: dict[str, Any]) -> None:
    told: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}
    check_tensors(entry, "inputs", [service_pb2.ModelMetadataResponse.TensorMetadata(**told)], entry.manifest.inputs)
    with pytest.raises(InferenceError, match="manifest"):
        check_tensors(entry, "inputs", [service_pb2.ModelMetadataResponse.TensorMetadata(**told | change)], entry.manifest.inputs)
    with pytest.raises(InferenceError, match="manifest"):
        check_tensors(entry, "inputs", [], entry.manifest.inputs)


@pytest.mark.anyio
async def test_the_first_failure_ends_its_siblings() -> None:
    ended: list[str] = []

    async def fail() -> None:
        raise CapacityError("full")

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waiting")

    calls: list[Awaitable[None]] = [wait(), fail(), wait()]
    with pytest.raises(CapacityError):
        await together(calls)
    assert ended == ["waiting", "waiting"]


@pytest.mark.anyio
@pytest.mark.parametrize("time", range(4))
async def test_calls_that_nobody_waits_for_trouble_no_later_test(silent: TritonBackend, entry: Entry, time: int) -> None:
    """Closing the backend ends them, and gRPC tells the loop of that a moment after."""
    asyncio.gather(*(silent.infer(entry, {"image": make_images(1)}, Ticket()) for _ in range(64)), return_exceptions=True)
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.anyio
async def test_a_server_that_is_away(alone: TritonBackend, entry: Entry) -> None:
    assert "does not answer" in (await alone.fault() or "")
    with pytest.raises(BackendUnavailableError):
        await alone.load(entry)
    with pytest.raises(BackendUnavailableError):
        await alone.infer(entry, {"image": make_images(1)}, Ticket())


@pytest.mark.anyio
async def test_a_server_that_is_away_at_a_load_is_left_alone(alone: TritonBackend, entry: Entry) -> None:
    with pytest.raises(BackendUnavailableError):
        await alone.load(entry)
    async with asyncio.timeout(10):
        while not alone.breaker.open:
            await asyncio.sleep(0.01)


def test_importing_the_backend_does_not_import_grpc() -> None:
    code = "import sys, app.backends.triton; sys.exit('grpc' in sys.modules or 'tritonclient' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
