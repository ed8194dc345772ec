"""The stages in their order, on the fake backend: what reaches the engine, what fails alone, and when time is up."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.admission import PixelBudget, Ticket
from app.backends.base import Tensors
from app.backends.fake import FakeBackend
from app.catalog import Catalog
from app.compute import make_pool
from app.decode import DecodeLimits, decode, open_image
from app.errors import BackendUnavailableError, DeadlineError, InferenceError, MalformedRequestError, TooLargeError
from app.manifest import Entry
from app.pipeline import Pipeline
from app.resize import resize
from app.tasks.base import AnyTask
from app.tasks.classify import Classify, ClassifyOptions
from app.tasks.detokenize import Detokenize
from app.tasks.reconstruct import Reconstruct
from app.tasks.tokenize import Tokenize, TokenizeOptions
from tests.factories import make_jpeg, make_png
from tests.repository import make_repository
from tests.tokenizer_repository import CODES, GRID, add_tokenizer

pytestmark = pytest.mark.anyio

TASK, OPTIONS = Classify(), ClassifyOptions()


class WatchedBackend(FakeBackend):
    """Keeps what it was given; sleeps `delay` seconds and fails on the images whose first pixel is in `poison`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[NDArray[Any]] = []
        self.delay = 0.0
        self.poison: NDArray[Any] | None = None

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        self.seen.append(inputs["image"])
        await asyncio.sleep(self.delay)
        if self.poison is not None and any(np.array_equal(image, self.poison) for image in inputs["image"]):
            raise InferenceError("poisoned")
        return await super().infer(entry, inputs, ticket)


async def no_smoke(backend: object, entry: object) -> None:
    pass


@pytest.fixture
def backend() -> WatchedBackend:
    return WatchedBackend()


@pytest.fixture
async def pipeline(tmp_path: Path, backend: WatchedBackend) -> AsyncIterator[Pipeline]:
    catalog = Catalog(make_repository(tmp_path), backend, no_smoke, {})
    await catalog.refresh()
    with make_pool(2) as pool:
        yield Pipeline(catalog, backend, DecodeLimits(max_pixels=300_000), PixelBudget(200_000), pool)


async def run(pipeline: Pipeline, *images: Any, ticket: Ticket | None = None) -> tuple[Any, ...]:
    return await run_task(pipeline, TASK, OPTIONS, *images, ticket=ticket)


def frame(pipeline: Pipeline, data: bytes) -> NDArray[Any]:
    (model,) = pipeline.catalog.models.values()
    image, info = decode(open_image(data, pipeline.limits))
    return resize(image, model.versions[0].entries["classify"].manifest.preprocessing, (info.width, info.height))


async def test_the_engine_gets_the_decoded_and_resized_images_in_one_call(pipeline: Pipeline, backend: WatchedBackend) -> None:
    images = [make_jpeg(80, 60, seed) for seed in range(3)]
    ticket = Ticket()
    items = await run(pipeline, *images, ticket=ticket)
    (seen,) = backend.seen
    assert np.array_equal(seen, np.stack([frame(pipeline, image) for image in images]))
    assert len({item.result.predictions[0].score for item in items}) == 3
    assert list(ticket.stages) == ["queue", "decode", "resize", "infer", "finish"]


async def test_refused_images_keep_their_place(pipeline: Pipeline, backend: WatchedBackend) -> None:
    refused = MalformedRequestError("not base64")
    items = await run(pipeline, make_png(), refused, b"text", make_png(600, 400), make_png(seed=1))
    assert [type(item.error) for item in items[1:3]] == [MalformedRequestError, type(items[2].error)]
    assert isinstance(items[3].error, TooLargeError)  # 240,000 pixels: within the limits, but not within the budget
    assert items[0].error is items[4].error is None
    assert [len(images) for images in backend.seen] == [2]


async def test_nothing_is_inferred_when_every_image_is_refused(pipeline: Pipeline, backend: WatchedBackend) -> None:
    await run(pipeline, b"text", b"")
    assert backend.seen == []


async def test_an_image_that_the_engine_cannot_take_fails_alone(pipeline: Pipeline, backend: WatchedBackend) -> None:
    images = [make_png(seed=seed) for seed in range(3)]
    backend.poison = frame(pipeline, images[1])
    items = await run(pipeline, *images)
    assert isinstance(items[1].error, InferenceError)
    assert items[1].image is not None
    assert items[0].result.predictions
    assert items[2].result.predictions


async def test_an_answer_is_drawn_onto_all_pixels_of_its_upright_image(pipeline: Pipeline) -> None:
    """An image of 240,000 pixels is read at half its size for the engine, and has too many to be drawn on."""
    drawn: list[tuple[tuple[int, int], Any]] = []

    def draw(image: Image.Image, result: Any) -> bytes:
        drawn.append((image.size, result))
        return b"file"

    entry = (await pipeline.catalog.acquire(None, TASK.name, TASK.role)).entries[TASK.role]
    preprocessing = entry.manifest.preprocessing.model_copy(update={"scaled_decoding": True})
    entries = [replace(entry, manifest=entry.manifest.model_copy(update={"preprocessing": preprocessing}))]
    sources = [make_jpeg(80, 60, orientation=6), b"text", make_jpeg(600, 400)]
    ticket = Ticket()
    answer = await pipeline.run(TASK, entries, sources, OPTIONS, ticket, draw=draw)
    assert drawn == [((60, 80), answer.items[0].result)]
    assert [item.drawn for item in answer.items] == [b"file", None, None]
    assert isinstance(answer.items[2].error, TooLargeError)
    assert answer.items[2].result is None
    assert "encode" in ticket.stages
    assert pipeline.pixels.try_take(200_000)


async def test_time_runs_out_while_the_engine_works(pipeline: Pipeline, backend: WatchedBackend) -> None:
    backend.delay = 5.0
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        await run(pipeline, make_png(), ticket=Ticket(deadline=started + 0.05))
    assert time.monotonic() - started < 2


async def test_an_expired_request_is_never_decoded(pipeline: Pipeline, backend: WatchedBackend) -> None:
    with pytest.raises(DeadlineError):
        await run(pipeline, make_png(), ticket=Ticket(deadline=0))
    assert backend.seen == []


async def test_a_dead_backend_concerns_the_whole_request(pipeline: Pipeline, backend: WatchedBackend) -> None:
    await run(pipeline, make_png())
    backend.down = "unplugged"
    with pytest.raises(BackendUnavailableError):
        await run(pipeline, make_png(), make_png())


async def test_an_image_that_waits_for_memory_holds_up_no_thread(pipeline: Pipeline) -> None:
    assert pipeline.pixels.try_take(200_000)
    ticket = Ticket()
    calls = [asyncio.create_task(run(pipeline, make_jpeg(80, 60, seed), ticket=ticket)) for seed in range(4)]
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in calls)
    assert await asyncio.get_running_loop().run_in_executor(pipeline.pool, int, "7") == 7
    pipeline.pixels.give_back(200_000)
    for (item,) in await asyncio.wait_for(asyncio.gather(*calls), 5):
        assert item.error is None
    assert ticket.stages["queue"] > 4 * 0.05, "waiting for memory is waiting"
    assert pipeline.pixels.used == 0


async def test_who_leaves_while_waiting_for_memory_leaves_it_to_others(pipeline: Pipeline) -> None:
    assert pipeline.pixels.try_take(200_000)
    leaving = asyncio.create_task(run(pipeline, make_jpeg(80, 60)))
    await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    pipeline.pixels.give_back(200_000)
    assert pipeline.pixels.used == 0


class ChainedBackend(FakeBackend):
    """Keeps what each engine was given and gave; the way back fails on the tokens in `poison`."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, Tensors]] = []
        self.gave: list[dict[str, NDArray[Any]]] = []
        self.poison: NDArray[Any] | None = None

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        self.given.append((entry.manifest.role, inputs))
        if self.poison is not None and any(np.array_equal(tokens, self.poison) for tokens in inputs.get("tokens", ())):
            raise InferenceError("poisoned")
        self.gave.append(await super().infer(entry, inputs, ticket))
        return self.gave[-1]


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[tuple[Pipeline, ChainedBackend]]:
    backend = ChainedBackend()
    add_tokenizer(tmp_path)
    catalog = Catalog(tmp_path, backend, no_smoke, {})
    await catalog.refresh()
    with make_pool(2) as pool:
        yield Pipeline(catalog, backend, DecodeLimits(), PixelBudget(200_000), pool), backend


async def run_task(pipeline: Pipeline, task: AnyTask, options: Any, *sources: Any, ticket: Ticket | None = None) -> tuple[Any, ...]:
    ticket = ticket or Ticket()
    async with ticket.within_deadline():
        entries = await pipeline.acquire(task, None, options, ticket)
        return (await pipeline.run(task, entries, sources, options, ticket)).items


async def test_the_second_engine_gets_what_the_first_gave(chain: tuple[Pipeline, ChainedBackend]) -> None:
    pipeline, backend = chain
    ticket = Ticket()
    items = await run_task(pipeline, Reconstruct(), None, *(make_png(seed=seed) for seed in range(3)), ticket=ticket)
    assert [role for role, _ in backend.given] == ["tokenize", "detokenize"]
    assert np.array_equal(backend.given[1][1]["tokens"], backend.gave[0]["tokens"])
    assert [np.array_equal(item.result.pixels, backend.gave[1]["image"][row]) for row, item in enumerate(items)] == [True] * 3
    assert set(ticket.stages) == {"decode", "resize", "queue", "infer", "finish"}


async def test_only_the_engines_that_the_options_need_are_asked(chain: tuple[Pipeline, ChainedBackend]) -> None:
    pipeline, backend = chain
    (item,) = await run_task(pipeline, Tokenize(), TokenizeOptions(), make_png())
    assert item.result.psnr is None
    assert [role for role, _ in backend.given] == ["tokenize"]
    (item,) = await run_task(pipeline, Tokenize(), TokenizeOptions(psnr=True), make_png())
    assert item.result.psnr > 0
    assert [role for role, _ in backend.given] == ["tokenize", "tokenize", "detokenize"]


async def test_a_value_that_is_no_image_is_not_decoded(chain: tuple[Pipeline, ChainedBackend]) -> None:
    pipeline, backend = chain
    grids = np.random.default_rng(0).integers(0, CODES, (3, *GRID)).astype(np.int32)
    ticket = Ticket()
    items = await run_task(pipeline, Detokenize(), None, *grids, ticket=ticket)
    assert np.array_equal(backend.given[0][1]["tokens"], grids)
    assert [item.image for item in items] == [None] * 3
    assert list(ticket.stages) == ["infer", "finish"]


async def test_an_item_that_the_second_engine_cannot_take_fails_alone(chain: tuple[Pipeline, ChainedBackend]) -> None:
    pipeline, backend = chain
    images = [make_png(seed=seed) for seed in range(3)]
    await run_task(pipeline, Tokenize(), TokenizeOptions(), *images)
    backend.poison = backend.gave[0]["tokens"][1]
    items = await run_task(pipeline, Reconstruct(), None, *images)
    assert [type(item.error) for item in items] == [type(None), InferenceError, type(None)]
    assert items[1].image is not None


async def test_tokens_that_are_not_in_the_codebook_are_the_engines_fault(chain: tuple[Pipeline, ChainedBackend]) -> None:
    pipeline, backend = chain
    gives = backend.infer

    async def wild(entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        return {name: array + CODES for name, array in (await gives(entry, inputs, ticket)).items()}

    backend.infer = wild  # type: ignore[method-assign]
    (item,) = await run_task(pipeline, Tokenize(), TokenizeOptions(), make_png())
    assert isinstance(item.error, InferenceError)
