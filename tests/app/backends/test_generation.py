"""The thread of a chat model: slots, places to wait, and streams that nobody waits for any more."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from app.backends.generation import GenerationThread, open_generation
from app.errors import CapacityError, InferenceError, InvalidValueError
from app.generate import Generator, Prompt, Sampling
from app.manifest import Entry
from tests.chat_repository import IMAGE, NAME, VOCABULARY, add_chat, poison_token

pytestmark = pytest.mark.anyio

ENDLESS = Sampling(max_tokens=50_000)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    add_chat(root, max_length=100_000, end_token_ids=(VOCABULARY,))
    return root


@pytest.fixture
def generator(repository: Path) -> Generator:
    return Generator.open(repository, NAME, 1, threads=1, max_streams=2)


@pytest.fixture
def thread(generator: Generator) -> Iterator[GenerationThread]:
    thread = GenerationThread(generator, f"{NAME}@1", NAME, max_waiting=1)
    yield thread
    thread.close()


def ids(*tokens: int) -> Prompt:
    return Prompt(np.array(tokens, np.int64))


async def answer(thread: GenerationThread, *tokens: int, most: int = 3) -> list[int | None]:
    return [event.token async for event in thread.generate(ids(*tokens), Sampling(max_tokens=most))]


async def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not true():
        assert time.monotonic() < limit
        await asyncio.sleep(0.005)


async def test_answers_one_after_the_other(thread: GenerationThread) -> None:
    assert await answer(thread, 40, 41) == [42, 43, 44]
    assert await answer(thread, 60) == [61, 62, 63]


async def test_answers_side_by_side(thread: GenerationThread) -> None:
    order = []

    async def follow(name: str) -> None:
        async for event in thread.generate(ids(40), Sampling(max_tokens=100)):
            order.append((name, event.token))  # noqa: PERF401 -- as they come

    await asyncio.gather(follow("a"), follow("b"))
    first, last = order.index(("b", 41)), max(index for index, (name, _) in enumerate(order) if name == "a")
    assert first < last
    assert len(order) == 200


async def test_a_stream_that_nobody_waits_for_ends_within_a_step(thread: GenerationThread, generator: Generator) -> None:
    async with aclosing(thread.generate(ids(40), ENDLESS)) as events:
        await anext(events)
        (stream,) = generator.streams
    made = len(stream.tokens)
    await until(lambda: not generator.streams)
    assert len(stream.tokens) <= made + 1


async def test_beyond_slots_and_places_it_is_full(thread: GenerationThread, generator: Generator) -> None:
    first, second = (thread.generate(ids(40), ENDLESS) for _ in range(2))
    await anext(first)
    await anext(second)
    waiting = asyncio.create_task(answer(thread, 60))
    await asyncio.sleep(0.05)
    with pytest.raises(CapacityError, match="2 questions, and 1 wait"):
        await answer(thread, 60)
    assert not waiting.done()
    await first.aclose()
    assert await waiting == [61, 62, 63]
    await second.aclose()
    await until(lambda: not generator.streams)


async def test_one_who_gives_up_waiting_leaves_its_place(thread: GenerationThread) -> None:
    running = [thread.generate(ids(40), ENDLESS) for _ in range(2)]
    for events in running:
        await anext(events)
    waiting = asyncio.create_task(answer(thread, 60))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    next_one = asyncio.create_task(answer(thread, 60))
    await running[0].aclose()
    assert await next_one == [61, 62, 63]
    await running[1].aclose()


async def test_a_prompt_that_cannot_be_is_its_own_fault(thread: GenerationThread) -> None:
    with pytest.raises(InvalidValueError, match="image tokens"):
        await answer(thread, IMAGE, 40)
    assert await answer(thread, 40) == [41, 42, 43]


async def test_what_nobody_foresaw_ends_one_request_and_not_the_thread(thread: GenerationThread) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(InferenceError, match="cannot begin"):
            [event async for event in thread.generate(ids(40), Sampling(seed=-1))]
        assert await answer(thread, 40) == [41, 42, 43]


async def test_closing_ends_all(generator: Generator) -> None:
    thread = GenerationThread(generator, f"{NAME}@1", NAME, max_waiting=1)
    events = thread.generate(ids(40), ENDLESS)
    await anext(events)
    await asyncio.to_thread(thread.close)
    with pytest.raises(InferenceError, match="not loaded"):
        [event async for event in events]
    with pytest.raises(InferenceError, match="not loaded"):
        await answer(thread, 40)


async def test_one_that_fails_leaves_the_others_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = add_chat(tmp_path)
    poison_token(entries, 50)
    thread = open_generation(decoder(entries), threads=1, max_streams=2, max_waiting=1)
    try:
        failing, sound = await asyncio.gather(answer(thread, 47, most=9), answer(thread, 60, most=9), return_exceptions=True)
    finally:
        thread.close()
    assert isinstance(failing, InferenceError)
    assert failing.detail == f"{NAME}.decoder@1: The engine failed on this input; the log says how."
    assert "Gather" in caplog.text, "onnxruntime's own words are for the log"
    assert sound == list(range(61, 70))


def test_a_model_is_tried_when_it_is_opened(tmp_path: Path) -> None:
    entries = add_chat(tmp_path)
    poison_token(entries, IMAGE)
    with pytest.raises(InferenceError, match=f"{NAME}.decoder@1: The engine failed"):
        open_generation(decoder(entries), threads=1, max_streams=1, max_waiting=1)
    decoder(entries).engine_file.write_bytes(b"none")
    with pytest.raises(InferenceError, match="cannot load"):
        open_generation(decoder(entries), threads=1, max_streams=1, max_waiting=1)


def decoder(entries: tuple[Entry, ...]) -> Entry:
    (found,) = (entry for entry in entries if entry.manifest.role == "decoder")
    return found
