"""One suite over every backend: what the protocol promises, each keeps. The Triton here is a real one."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from app.admission import Ticket
from app.backends.base import Backend
from app.backends.fake import FakeBackend
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.backends.triton import TritonBackend
from app.errors import BackendError, CapacityError, DeadlineError, InferenceError
from app.manifest import Entry
from tests import triton
from tests.repository import MAX_BATCH, POISON, add_echo, add_entry, make_images, reference

pytestmark = pytest.mark.anyio

TRITON = pytest.param("triton", marks=pytest.mark.triton)
TRITON_BY_GRPC = pytest.param("triton by gRPC alone", marks=pytest.mark.triton)
BACKENDS = ("onnxruntime", TRITON, TRITON_BY_GRPC, "fake")
ENGINES = ("onnxruntime", TRITON, TRITON_BY_GRPC)
QUEUE = 4  # calls that may wait for the slow engine


@dataclass(frozen=True)
class Repository:
    """`slow` takes some 20 ms a row; `poisoned` fails on a POISON pixel; `echo` gives its inputs back."""

    root: Path
    first: Entry
    second: Entry
    poisoned: Entry
    slow: Entry
    echo: Entry


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    root = tmp_path_factory.mktemp("served") / "repository"
    return Repository(
        root,
        first=add_entry(root),
        second=add_entry(root, version=2),
        poisoned=add_entry(root, "poisoned", poison=True),
        slow=add_entry(root, "slow", delay=256, queue=QUEUE),
        echo=add_echo(root),
    )


@pytest.fixture(scope="module")
def triton_url(repository: Repository) -> Iterator[str]:
    with triton.serve(repository.root) as server:
        yield server.url


@pytest.fixture
async def backend(request: pytest.FixtureRequest, repository: Repository) -> AsyncIterator[Backend]:
    made = make_backend(request.param, request)
    await made.start()
    for entry in (repository.first, repository.second, repository.poisoned, repository.slow, repository.echo):
        await made.load(entry)
    yield made
    await made.close()


def make_backend(name: str, request: pytest.FixtureRequest) -> Backend:
    if name.startswith("triton"):
        return TritonBackend(request.getfixturevalue("triton_url"), shared_memory="on" if name == "triton" else "off")
    return FakeBackend() if name == "fake" else OnnxRuntimeBackend(max_queue=64)


every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
every_engine = pytest.mark.parametrize("backend", ENGINES, indirect=True)


async def probabilities(backend: Backend, entry: Entry, images: np.ndarray, ticket: Ticket | None = None) -> np.ndarray:
    outputs = await backend.infer(entry, {"image": images}, ticket or Ticket())
    assert list(outputs) == ["probabilities"]
    return outputs["probabilities"]


@every_backend
@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH, 20])
async def test_every_row_gets_its_answer(backend: Backend, repository: Repository, rows: int) -> None:
    images = make_images(rows)
    ticket = Ticket()
    answer = await probabilities(backend, repository.first, images, ticket)
    assert answer.shape == (rows, 6)
    assert answer.dtype == np.float32
    alone = [await probabilities(backend, repository.first, image[None]) for image in images]
    np.testing.assert_allclose(answer, np.concatenate(alone), atol=1e-5)
    assert ticket.stages["infer"] > 0


@every_engine
@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH, 20])
async def test_the_answer_is_right(backend: Backend, repository: Repository, rows: int) -> None:
    images = make_images(rows)
    np.testing.assert_allclose(await probabilities(backend, repository.first, images), reference(images), atol=1e-5)


@every_engine
async def test_versions_answer_side_by_side(backend: Backend, repository: Repository) -> None:
    images = make_images(3)
    first, second = [await probabilities(backend, entry, images) for entry in (repository.first, repository.second)]
    np.testing.assert_allclose(first, reference(images, 1), atol=1e-5)
    np.testing.assert_allclose(second, reference(images, 2), atol=1e-5)
    assert np.abs(first - second).max() > 0.01


@every_engine
async def test_every_dtype_comes_back_as_it_went(backend: Backend, repository: Repository) -> None:
    inputs = {spec.name: np.array([[1, 2], [3, 100]], spec.dtype) for spec in repository.echo.manifest.inputs}
    outputs = await backend.infer(repository.echo, inputs, Ticket())
    assert {name: array.dtype for name, array in outputs.items()} == {f"{name}_out": a.dtype for name, a in inputs.items()}
    for name, array in inputs.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"], array)


@every_backend
async def test_concurrent_calls_get_their_own_answers(backend: Backend, repository: Repository) -> None:
    images = make_images(30, seed=1)
    alone = await probabilities(backend, repository.first, images)
    together = await asyncio.gather(*(probabilities(backend, repository.first, image[None]) for image in images))
    np.testing.assert_allclose(np.concatenate(together), alone, atol=1e-5)
    assert len({row.tobytes() for row in alone}) == 30


@every_engine
async def test_concurrent_calls_of_several_sizes_are_not_mixed_up(backend: Backend, repository: Repository) -> None:
    images = make_images(48, seed=2)
    calls = np.split(images, np.cumsum([1, 3, 2, 5, 1, 1, 4, 2, 1, 7, 3, 2, 1, 4, 2, 5, 1, 2]))
    answers = await asyncio.gather(*(probabilities(backend, repository.poisoned, call) for call in calls))
    for call, answer in zip(calls, answers, strict=True):
        np.testing.assert_allclose(answer, reference(call), atol=1e-5)


@every_backend
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"image": make_images(2).astype(np.float32)}, id="dtype"),
        pytest.param({"image": make_images(2, size=8)}, id="shape"),
        pytest.param({"image": make_images(2)[0]}, id="rank"),
        pytest.param({"image": make_images(2)[:0]}, id="no rows"),
        pytest.param({"picture": make_images(2)}, id="name"),
        pytest.param({}, id="nothing"),
    ],
)
async def test_wrong_inputs_are_an_inference_error(backend: Backend, repository: Repository, inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(InferenceError):
        await backend.infer(repository.first, inputs, Ticket())
    assert len(await probabilities(backend, repository.first, make_images(2))) == 2


@every_backend
async def test_an_unknown_version_is_an_error(backend: Backend, repository: Repository) -> None:
    unknown = replace(repository.first, version=7, path=repository.root / "colours" / "7")
    with pytest.raises(BackendError):
        await backend.infer(unknown, {"image": make_images(1)}, Ticket())


@every_engine
async def test_what_is_not_there_cannot_be_loaded(backend: Backend, repository: Repository) -> None:
    unknown = replace(repository.first, version=7, path=repository.root / "colours" / "7")
    with pytest.raises(BackendError, match="colours@7"):
        await backend.load(unknown)
    assert len(await probabilities(backend, repository.first, make_images(1))) == 1


@every_backend
async def test_loading_twice_is_harmless(backend: Backend, repository: Repository) -> None:
    await backend.load(repository.first)
    assert len(await probabilities(backend, repository.first, make_images(1))) == 1


@every_backend
async def test_an_expired_ticket_is_refused(backend: Backend, repository: Repository) -> None:
    ticket = Ticket(deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineError):
        await probabilities(backend, repository.first, make_images(1), ticket)
    assert "infer" not in ticket.stages


@every_engine
async def test_nothing_is_computed_for_a_ticket_that_left(backend: Backend, repository: Repository) -> None:
    ticket = Ticket(cancelled=True)
    with pytest.raises(DeadlineError):
        await probabilities(backend, repository.first, make_images(1), ticket)
    assert "infer" not in ticket.stages


@every_engine
async def test_a_poisoned_input_fails_alone(backend: Backend, repository: Repository) -> None:
    images = make_images(24)
    images[5, 0, 0, 0] = POISON
    calls = (probabilities(backend, repository.poisoned, image[None]) for image in images)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers.pop(5), InferenceError)
    np.testing.assert_allclose(np.concatenate(answers), np.delete(reference(images), 5, axis=0), atol=1e-5)


@every_engine
async def test_a_poisoned_piece_fails_the_whole_call(backend: Backend, repository: Repository) -> None:
    images = make_images(20)
    images[12, 0, 0, 0] = POISON
    with pytest.raises(InferenceError):
        await probabilities(backend, repository.poisoned, images)
    assert len(await probabilities(backend, repository.poisoned, make_images(20))) == 20


@pytest.mark.parametrize("name", ENGINES)
async def test_a_full_queue_is_a_capacity_error(name: str, repository: Repository, request: pytest.FixtureRequest) -> None:
    backend = OnnxRuntimeBackend(max_queue=QUEUE) if name == "onnxruntime" else make_backend(name, request)
    await backend.start()
    await backend.load(repository.slow)
    images = make_images(40)
    calls = (probabilities(backend, repository.slow, image[None]) for image in images)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert {type(error) for error in refused} == {CapacityError}
    assert QUEUE <= len(answers) - len(refused) < 30
    for image, answer in zip(images, answers, strict=True):
        if isinstance(answer, np.ndarray):
            np.testing.assert_allclose(answer, reference(image[None]), atol=1e-5)
    await backend.close()


@every_backend
async def test_a_working_backend_has_no_fault(backend: Backend, repository: Repository) -> None:
    assert await backend.fault() is None
    assert backend.refuses(repository.first) is None


@pytest.mark.triton
async def test_the_engines_agree(repository: Repository, request: pytest.FixtureRequest) -> None:
    answers = []
    for name in ("onnxruntime", "triton"):
        backend = make_backend(name, request)
        await backend.start()
        await backend.load(repository.first)
        answers.append(await probabilities(backend, repository.first, make_images(20)))
        await backend.close()
    np.testing.assert_allclose(*answers, atol=1e-5)
