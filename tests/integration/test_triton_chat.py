"""A chat model inside a real Triton: tokens stream out of its Python model, several requests side by side."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.backends.several import SeveralTritons
from app.backends.triton import TritonBackend
from app.errors import BackendUnavailableError, CapacityError, InferenceError, InvalidValueError
from app.generate import Event, PreparedImage, Prompt, Sampling
from app.local_triton import free_ports
from app.manifest import Entry
from export.config import MAX_STREAMS, render_config
from export.stage import write_triton_model
from tests.chat_repository import CHANNELS, END, IMAGE, NAME, ROLES, add_chat
from tests.triton import serve

pytestmark = [pytest.mark.triton, pytest.mark.anyio]

ENDLESS = 19_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    root: Path = tmp_path_factory.mktemp("triton") / "repository"
    entries = add_chat(root, max_length=ENDLESS + 1000)
    for role, entry in zip(ROLES, entries, strict=True):
        (root / f"{NAME}.{role}" / "config.pbtxt").write_text(render_config(entry.manifest))
    write_triton_model(entries[-1].path)
    with serve(root) as server:
        yield server.url, entries


@pytest.fixture(scope="module")
async def backend(served: tuple[str, tuple[Entry, ...]]) -> AsyncIterator[TritonBackend]:
    url, entries = served
    backend = TritonBackend(url)
    await backend.start()
    for entry in entries:
        await backend.load(entry)
    yield backend
    await backend.close()


@pytest.fixture
def decoder(served: tuple[str, tuple[Entry, ...]]) -> Entry:
    return served[1][-1]


def ids(*tokens: int) -> Prompt:
    return Prompt(np.array(tokens, np.int64))


async def answer(backend: TritonBackend, decoder: Entry, prompt: Prompt, **sampling: Any) -> list[Event]:
    async with aclosing(backend.generate(decoder, prompt, Sampling(**sampling))) as events:
        return [event async for event in events]


async def test_an_answer_comes_token_by_token(backend: TritonBackend, decoder: Entry) -> None:
    events = await answer(backend, decoder, ids(40, 41), max_tokens=3)
    assert [(event.token, event.finish) for event in events] == [(42, None), (43, None), (44, "length")]
    assert events[-1].stream.tokens == [42, 43, 44]
    events = await answer(backend, decoder, ids(END - 2))
    assert [(event.token, event.finish) for event in events] == [(END - 1, None), (None, "stop")]


async def test_images_of_two_sizes_are_seen(backend: TritonBackend, decoder: Entry) -> None:
    images = (
        PreparedImage(np.full((24, CHANNELS), 100, np.uint8), (1, 4, 6)),
        PreparedImage(np.full((4, CHANNELS), 50, np.uint8), (1, 2, 2)),
    )
    events = await answer(backend, decoder, Prompt(np.array([*[IMAGE] * 6, 7, IMAGE]), images), max_tokens=1)
    assert [event.token for event in events] == [51]


async def test_a_seed_repeats_an_answer(backend: TritonBackend, decoder: Entry) -> None:
    answers = [await answer(backend, decoder, ids(60), seed=seed, temperature=20.0, max_tokens=16) for seed in (1, 1, 2)]
    first, again, other = (events[-1].stream.tokens for events in answers)
    assert first == again != other


async def test_four_streams_advance_together(backend: TritonBackend, decoder: Entry) -> None:
    """The fourth's first token comes before the first's last."""
    order: list[int] = []

    async def ask(place: int) -> None:
        async with aclosing(backend.generate(decoder, ids(place), Sampling(max_tokens=300))) as events:
            async for _ in events:
                order.append(place)  # noqa: PERF401  in the order of all four

    async with asyncio.TaskGroup() as group:
        for place in range(4):
            group.create_task(ask(place))
    assert [order.count(place) for place in range(4)] == [300] * 4
    assert order.index(3) < len(order) - 1 - order[::-1].index(0)


async def test_what_is_wrong_with_a_prompt_is_told(backend: TritonBackend, decoder: Entry) -> None:
    with pytest.raises(InvalidValueError, match="more image tokens"):
        await answer(backend, decoder, ids(1, IMAGE))


async def test_what_nobody_foresaw_ends_one_request_and_not_the_model(backend: TritonBackend, decoder: Entry) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(InferenceError, match="cannot be begun"):
            await answer(backend, decoder, ids(40), seed=-1)
        assert [event.token for event in await answer(backend, decoder, ids(40), max_tokens=2)] == [41, 42]


async def test_a_client_that_leaves_frees_its_slot(backend: TritonBackend, decoder: Entry) -> None:
    streams = [backend.generate(decoder, ids(place), Sampling(max_tokens=ENDLESS)) for place in range(MAX_STREAMS)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(CapacityError, match="taken"):
        await answer(backend, decoder, ids(5), max_tokens=1)
    await streams[3].aclose()
    async with asyncio.timeout(30):
        while True:
            try:
                events = await answer(backend, decoder, ids(5), max_tokens=1)
            except CapacityError:
                await asyncio.sleep(0.05)
            else:
                break
    assert events[0].token == 6
    for stream in streams:
        await stream.aclose()


async def test_a_decoder_that_was_unloaded_is_unavailable(backend: TritonBackend, decoder: Entry) -> None:
    await backend._client.unload_model(decoder.name)
    async with asyncio.timeout(30):
        while await backend._is_ready(decoder):
            await asyncio.sleep(0.05)
    with pytest.raises(BackendUnavailableError, match="ready"):
        await answer(backend, decoder, ids(40))
    await backend.load(decoder)
    assert [event.token for event in await answer(backend, decoder, ids(40), max_tokens=2)] == [41, 42]


async def test_another_server_answers_for_one_that_is_away(served: tuple[str, tuple[Entry, ...]], decoder: Entry) -> None:
    url, entries = served
    several = SeveralTritons([TritonBackend(url), TritonBackend(f"127.0.0.1:{free_ports().grpc}")])
    await several.start()
    try:
        for entry in entries:
            await several.load(entry)
        for _ in range(4):
            async with aclosing(several.generate(decoder, ids(40, 41), Sampling(max_tokens=2))) as events:
                assert [event.token async for event in events] == [42, 43]
        assert several.troubles() == several.servers[1].troubles() != []
    finally:
        await several.close()


async def test_a_server_that_is_away_is_told(decoder: Entry) -> None:
    alone = TritonBackend(f"127.0.0.1:{free_ports().grpc}")
    await alone.start()
    with pytest.raises(BackendUnavailableError):
        await answer(alone, decoder, ids(1))
    await alone.close()
