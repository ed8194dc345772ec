"""The stages in their order, on the fake backend: what reaches the engine, what fails alone, and when time is up."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

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
from app.tasks.classify import Classify, ClassifyOptions
from tests.factories import make_jpeg, make_png
from tests.repository import make_repository

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
    ticket = ticket or Ticket()
    entries = await pipeline.acquire(TASK, None, OPTIONS, ticket)
    return (await pipeline.run(TASK, entries, images, OPTIONS, ticket)).items


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
    assert ticket.stages["queue"] > 4 * 0.09, "waiting for memory is waiting"
    assert pipeline.pixels.used == 0


async def test_who_leaves_while_waiting_for_memory_leaves_it_to_others(pipeline: Pipeline) -> None:
    assert pipeline.pixels.try_take(200_000)
    leaving = asyncio.create_task(run(pipeline, make_jpeg(80, 60)))
    await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    pipeline.pixels.give_back(200_000)
    assert pipeline.pixels.used == 0
