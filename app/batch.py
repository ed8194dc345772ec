"""Fifth stage of a request: whatever has queued for an engine becomes one inference (embedded engine only).

No time is ever added to wait for company: a worker that becomes free takes what is there, up to the engine's largest batch.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import metrics
from app.admission import Ticket
from app.errors import CapacityError, DeadlineError

Inputs = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]
Forward = Callable[[Inputs], Outputs]


@dataclass(eq=False)
class Member:
    """One call that waits for its turn: `rows` rows of every input."""

    inputs: Inputs
    rows: int
    ticket: Ticket
    result: "asyncio.Future[Outputs]"
    queued: float = field(default_factory=time.perf_counter)

    @property
    def departed(self) -> bool:
        return self.result.done() or not self.ticket.live


class Batcher:
    """Merges the calls for one engine. Lives on one event loop; `forward` runs on `executor`, `workers` at a time."""

    def __init__(self, name: str, forward: Forward, executor: Executor, *, max_batch: int, workers: int, max_queue: int) -> None:
        self.name = name
        self.max_batch = max_batch
        self.max_queue = max_queue
        self._forward = forward
        self._executor = executor
        self._idle = workers
        self._waiting: deque[Member] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._depth = metrics.QUEUE_DEPTH.labels(name)
        self._sizes = metrics.BATCH_SIZE.labels(name)

    async def submit(self, inputs: Inputs, ticket: Ticket) -> Outputs:
        """Queue 1..max_batch rows and wait for their outputs.

        Raises:
            CapacityError: `max_queue` calls are waiting already.
            DeadlineError: the ticket's time ran out before an inference began.
            Whatever `forward` raises for these rows alone.
        """
        ticket.check()
        if len(self._waiting) >= self.max_queue:
            raise CapacityError(f"{self.max_queue} inferences wait for {self.name} already; retry later.")
        rows = len(next(iter(inputs.values())))
        member = Member(inputs, rows, ticket, asyncio.get_running_loop().create_future())
        self._waiting.append(member)
        self._dispatch()
        return await member.result

    async def drain(self) -> None:
        """Wait until nothing runs any more."""
        while self._running:
            await asyncio.wait(self._running)

    def _dispatch(self) -> None:
        while self._idle and (batch := self._take()):
            self._idle -= 1
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        self._depth.set(len(self._waiting))

    def _take(self) -> list[Member]:
        batch: list[Member] = []
        rows = 0
        while self._waiting and rows + self._waiting[0].rows <= self.max_batch:
            member = self._waiting.popleft()
            if member.departed:
                _dismiss(member)
                continue
            batch.append(member)
            rows += member.rows
        return batch

    async def _run(self, batch: list[Member]) -> None:
        started = time.perf_counter()
        try:
            await self._answer(batch)
        finally:
            ended = time.perf_counter()
            for member in batch:
                member.ticket.record("queue", started - member.queued, started)
                member.ticket.record("infer", ended - started)
            self._idle += 1
            self._dispatch()

    async def _answer(self, batch: list[Member]) -> None:
        """Run the batch; when it fails, run its members one by one, so that a poisoned input fails alone."""
        loop = asyncio.get_running_loop()
        self._sizes.observe(sum(member.rows for member in batch))
        try:
            outputs = await loop.run_in_executor(self._executor, self._forward, _merge(batch))
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0], error)
                return
            for member in batch:
                await self._answer([member])
            return
        start = 0
        for member in batch:
            stop = start + member.rows
            _settle(member, {name: array[start:stop] for name, array in outputs.items()})
            start = stop


def _merge(batch: list[Member]) -> Inputs:
    if len(batch) == 1:
        return batch[0].inputs
    return {name: np.concatenate([member.inputs[name] for member in batch]) for name in batch[0].inputs}


def _settle(member: Member, outcome: Outputs | Exception) -> None:
    if member.result.done():
        return
    if isinstance(outcome, Exception):
        member.result.set_exception(outcome)
    else:
        member.result.set_result(outcome)


def _dismiss(member: Member) -> None:
    """Nobody waits for this member any more, or its time is over: it is never computed."""
    _settle(member, DeadlineError("The request's time ran out while it waited for the engine; retry later."))
