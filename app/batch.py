"""Fifth stage of a request: whatever has queued for an engine becomes one inference (embedded engine only).

A batch forms at the moment when a thread is free to compute it, of what waits then, up to the engine's largest batch. No time is
added to wait for company unless `delay` says so.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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
Forward = Callable[[Inputs, bool], Outputs]
"""Computes a batch; the flag tells that no other inference of this engine waits or runs, so that this one may use every core."""


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


@dataclass(frozen=True)
class Run:
    """What one turn of a worker came to: an outcome for each member of its batch, and those that it dropped."""

    batch: list[Member]
    outcomes: list[Outputs | Exception]
    departed: list[Member]
    started: float
    ended: float


class Batcher:
    """Merges the calls for one engine. `submit` lives on one event loop; `forward` runs on `executor`, `workers` at a time."""

    def __init__(
        self, name: str, forward: Forward, executor: Executor, *, max_batch: int, workers: int, max_queue: int, delay: float = 0.0
    ) -> None:
        """`delay`: seconds that a batch which is not full waits for more; 0 never waits."""
        self.name = name
        self.max_batch = max_batch
        self.max_queue = max_queue
        self._forward = forward
        self._executor = executor
        self._workers = workers
        self._delay = delay
        self._timer: asyncio.TimerHandle | None = None
        self._turns: set[asyncio.Future[Run]] = set()
        # Shared with the workers, under the lock:
        self._lock = threading.Lock()
        self._waiting: deque[Member] = deque()
        self._rows = 0  # of all that wait
        self._due = 0  # turns that have not begun
        self._busy = 0  # turns that have begun and not ended
        self._depth = metrics.Level(metrics.QUEUE_DEPTH.labels(name))
        self._sizes = metrics.BATCH_SIZE.labels(name)

    async def submit(self, inputs: Inputs, ticket: Ticket) -> Outputs:
        """Queue 1..max_batch rows and wait for their outputs.

        Raises:
            CapacityError: `max_queue` calls are waiting already.
            DeadlineError: the ticket's time ran out before an inference began.
            Whatever `forward` raises for these rows alone.
        """
        ticket.check()
        self.check_room()
        member = Member(inputs, len(next(iter(inputs.values()))), ticket, asyncio.get_running_loop().create_future())
        with self._lock:
            self._waiting.append(member)
            self._rows += member.rows
        self._dispatch()
        try:
            return await member.result
        except asyncio.CancelledError:
            self._drop(member)
            raise

    def check_room(self) -> None:
        """Refuse at once what `submit` would refuse.

        Raises:
            CapacityError: `max_queue` calls are waiting already.
        """
        if len(self._waiting) >= self.max_queue:
            raise CapacityError(f"{self.max_queue} inferences wait for {self.name} already; retry later.")

    async def drain(self) -> None:
        """Wait until nothing runs any more."""
        while self._turns or self._waiting:
            await (asyncio.wait(self._turns) if self._turns else asyncio.sleep(self._delay))

    def _drop(self, member: Member) -> None:
        """Nobody waits for it any more: its place in the queue is another's."""
        with self._lock:
            if member in self._waiting:
                self._waiting.remove(member)
                self._rows -= member.rows
        self._depth.set(len(self._waiting))

    def _dispatch(self) -> None:
        """Give out as many turns as what waits can fill."""
        while len(self._turns) < self._workers and self._rows > self._due * self.max_batch and not self._waits_for_company():
            with self._lock:  # the turn itself begins with the lock
                turn = asyncio.get_running_loop().run_in_executor(self._executor, self._turn)
                self._due += 1
            self._turns.add(turn)
            turn.add_done_callback(self._settle)
        self._depth.set(len(self._waiting))

    def _waits_for_company(self) -> bool:
        """Whether the batch that would form now is to wait; comes back to it in time."""
        if not self._delay or self._rows >= self.max_batch:
            return False
        try:
            remaining = self._waiting[0].queued + self._delay - time.perf_counter()
        except IndexError:
            return False
        if remaining <= 0:
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(remaining, self._dispatch)
        return True

    def _turn(self) -> Run:
        """On a thread of the executor: take a batch and compute it. When it fails, its members are computed one by one, so that
        a poisoned input fails alone."""
        with self._lock:
            self._due -= 1
            self._busy += 1
            departed: list[Member] = []
            batch = list(self._take(departed))
            alone = self._busy == 1 and not self._due and not self._waiting
        started = time.perf_counter()
        outcomes = self._compute(batch, alone) if batch else []
        with self._lock:
            self._busy -= 1
        return Run(batch, outcomes, departed, started, time.perf_counter())

    def _take(self, departed: list[Member]) -> Iterator[Member]:
        free = self.max_batch
        while self._waiting and self._waiting[0].rows <= free:
            member = self._waiting.popleft()
            self._rows -= member.rows
            if member.departed:
                departed.append(member)
            else:
                free -= member.rows
                yield member

    def _compute(self, batch: list[Member], alone: bool) -> list[Outputs | Exception]:
        try:
            return list(_split(self._forward(_merge(batch), alone), batch))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [outcome for member in batch for outcome in self._compute([member], alone)]

    def _settle(self, turn: "asyncio.Future[Run]") -> None:
        """Back on the event loop."""
        self._turns.discard(turn)
        if turn.cancelled():
            return
        run = turn.result()
        if run.batch:
            self._sizes.observe(sum(member.rows for member in run.batch))
        for member, outcome in zip(run.batch, run.outcomes, strict=True):
            member.ticket.record("queue", run.started - member.queued, run.started)
            member.ticket.record("infer", run.ended - run.started, run.ended)
            _answer(member, outcome)
        for member in run.departed:
            _answer(member, DeadlineError("The request's time ran out while it waited for the engine; retry later."))
        self._dispatch()


def _merge(batch: list[Member]) -> Inputs:
    if len(batch) == 1:
        return batch[0].inputs
    return {name: np.concatenate([member.inputs[name] for member in batch]) for name in batch[0].inputs}


def _split(outputs: Outputs, batch: list[Member]) -> Iterator[Outputs]:
    start = 0
    for member in batch:
        stop = start + member.rows
        yield {name: array[start:stop] for name, array in outputs.items()}
        start = stop


def _answer(member: Member, outcome: Outputs | Exception) -> None:
    if member.result.done():
        return
    if isinstance(outcome, Exception):
        member.result.set_exception(outcome)
    else:
        member.result.set_result(outcome)
