"""Batches form from what has queued; each member gets its own rows, and only its own troubles."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.admission import Ticket
from app.batch import Batcher
from app.errors import CapacityError, DeadlineError, InferenceError

pytestmark = pytest.mark.anyio

Tensors = dict[str, NDArray[Any]]


class Engine:
    """Doubles its input; waits for `gate` before each run; fails on a batch that holds -1."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.runs: list[int] = []
        self.alone: list[bool] = []

    def __call__(self, inputs: Tensors, alone: bool) -> Tensors:
        self.entered.set()
        self.gate.wait(5)
        self.runs.append(len(inputs["x"]))
        self.alone.append(alone)
        if (inputs["x"] == -1).any():
            raise InferenceError("poisoned")
        return {"y": inputs["x"] * 2}


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def make_batcher(engine: Engine, executor: ThreadPoolExecutor, **options: int) -> Batcher:
    return Batcher("engine", engine, executor, **{"max_batch": 4, "workers": 1, "max_queue": 16} | options)


def rows(*values: int) -> Tensors:
    return {"x": np.array(values)}


async def until_queued(batcher: Batcher, count: int) -> None:
    """Until `count` calls wait and none is on its way to a worker."""
    while len(batcher._waiting) != count or batcher._due:
        await asyncio.sleep(0)


async def occupy(batcher: Batcher, engine: Engine, *values: int) -> "asyncio.Task[Tensors]":
    """Have a worker stand at the closed gate with one call."""
    engine.gate.clear()
    engine.entered.clear()
    call = asyncio.create_task(batcher.submit(rows(*values), Ticket()))
    while not engine.entered.is_set():
        await asyncio.sleep(0)
    return call


async def test_what_queues_while_the_worker_is_busy_becomes_one_batch(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor)
    first = await occupy(batcher, engine, 0)
    calls = [first, *(asyncio.create_task(batcher.submit(rows(i), Ticket())) for i in range(1, 6))]
    await until_queued(batcher, 5)
    engine.gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer["y"].tolist() for answer in answers] == [[0], [2], [4], [6], [8], [10]]
    assert engine.runs == [1, 4, 1]


async def test_rows_of_one_call_stay_together(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor)
    first = await occupy(batcher, engine, 0)
    calls = [first, *(asyncio.create_task(batcher.submit(rows(*range(n)), Ticket())) for n in (3, 2, 2))]
    await until_queued(batcher, 3)
    engine.gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer["y"].tolist() for answer in answers] == [[0], [0, 2, 4], [0, 2], [0, 2]]
    assert engine.runs == [1, 3, 4]


async def test_two_workers_run_at_once(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor, workers=2)
    first = await occupy(batcher, engine, 0)
    second = await occupy(batcher, engine, 1)
    third = asyncio.create_task(batcher.submit(rows(2), Ticket()))
    await until_queued(batcher, 1)
    engine.gate.set()
    await asyncio.gather(first, second, third)
    assert engine.runs == [1, 1, 1]


async def test_a_poisoned_member_fails_alone(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor)
    first = await occupy(batcher, engine, 7)
    calls = [first, *(asyncio.create_task(batcher.submit(rows(i), Ticket())) for i in (1, -1, 3))]
    await until_queued(batcher, 3)
    engine.gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers[2], InferenceError)
    assert [answers[i]["y"].tolist() for i in (0, 1, 3)] == [[14], [2], [6]]
    assert engine.runs == [1, 3, 1, 1, 1]
    assert (await batcher.submit(rows(5), Ticket()))["y"].tolist() == [10]


async def test_the_departed_and_the_expired_are_never_computed(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor)
    gone, late = Ticket(), Ticket(deadline=time.monotonic() + 0.05)
    first = await occupy(batcher, engine, 0)
    others = [asyncio.create_task(batcher.submit(rows(i), ticket)) for i, ticket in enumerate((gone, late, Ticket()))]
    cancelled = asyncio.create_task(batcher.submit(rows(9), Ticket()))
    await until_queued(batcher, 4)
    gone.cancelled = True
    cancelled.cancel()
    await asyncio.sleep(0.06)
    engine.gate.set()
    answers = await asyncio.gather(first, *others, cancelled, return_exceptions=True)
    assert [type(answer) for answer in answers[1:3]] == [DeadlineError, DeadlineError]
    assert isinstance(answers[4], asyncio.CancelledError)
    assert answers[3]["y"].tolist() == [4]
    assert engine.runs == [1, 1]


async def test_a_full_queue_refuses_at_once(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor, max_queue=2)
    first = await occupy(batcher, engine, 0)
    calls = [first, *(asyncio.create_task(batcher.submit(rows(i), Ticket())) for i in range(1, 3))]
    await until_queued(batcher, 2)
    with pytest.raises(CapacityError):
        await batcher.submit(rows(9), Ticket())
    engine.gate.set()
    assert len(await asyncio.gather(*calls)) == 3


async def test_waiting_and_computing_are_timed_apart(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor)
    tickets = [Ticket(), Ticket()]
    engine.gate.clear()
    calls = [asyncio.create_task(batcher.submit(rows(1), tickets[0]))]
    while not engine.entered.is_set():
        await asyncio.sleep(0)
    calls.append(asyncio.create_task(batcher.submit(rows(1), tickets[1])))
    await until_queued(batcher, 1)
    await asyncio.sleep(0.05)
    engine.gate.set()
    await asyncio.gather(*calls)
    await batcher.drain()
    first, second = (ticket.stages for ticket in tickets)
    assert first["infer"] >= 0.04 > first["queue"]
    assert second["queue"] >= 0.04 > second["infer"]


async def test_only_what_no_other_runs_or_waits_beside_is_alone(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = make_batcher(engine, executor, workers=2)
    first = await occupy(batcher, engine, 0)
    second = await occupy(batcher, engine, 1)
    engine.gate.set()
    await asyncio.gather(first, second)
    assert sorted(engine.alone) == [False, True], "the first was, when it began"
    await batcher.submit(rows(2), Ticket())
    assert engine.alone[-1]


async def test_a_batch_forms_when_a_thread_is_free_to_compute_it(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as pool:
        batcher = make_batcher(engine, pool)
        busy = threading.Event()
        pool.submit(busy.wait, 5)
        calls = [asyncio.create_task(batcher.submit(rows(i), Ticket())) for i in range(4)]
        while len(batcher._waiting) < 4:
            await asyncio.sleep(0)
        busy.set()
        await asyncio.gather(*calls)
    assert engine.runs == [4]


async def test_a_delay_waits_for_company_but_not_longer(engine: Engine, executor: ThreadPoolExecutor) -> None:
    batcher = Batcher("engine", engine, executor, max_batch=4, workers=1, max_queue=16, delay=0.2)
    started = time.monotonic()
    first = asyncio.create_task(batcher.submit(rows(1), Ticket()))
    await asyncio.sleep(0.05)
    await asyncio.gather(first, batcher.submit(rows(2), Ticket()))
    assert engine.runs == [2]
    assert 0.2 <= time.monotonic() - started < 1
    await asyncio.gather(*(batcher.submit(rows(i), Ticket()) for i in range(4)))
    assert time.monotonic() - started < 1
    assert engine.runs == [2, 4]
