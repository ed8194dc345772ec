"""Several Triton servers of one repository as one backend: the load is spread, and a server that is away is passed over."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any

from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Tensors
from app.backends.triton import TritonBackend
from app.errors import BackendUnavailableError, DeadlineError, VitrineError
from app.generate import Event, Prompt, Sampling
from app.manifest import Entry


class SeveralTritons:
    """Gives each call to the server with the fewest in flight; a call whose server went away is repeated once, on another.

    An inference changes nothing, so that repeating it is safe; it is done only when the first server is gone, or does not have
    the model, and so does not compute it as well. What ran out of time or failed is not repeated.
    """

    name = "triton"

    def __init__(self, servers: Sequence[TritonBackend]) -> None:
        self.servers = tuple(servers)
        self._in_flight = [0] * len(self.servers)
        self._turn = 0
        self._mending: dict[tuple[int, str], asyncio.Task[None]] = {}

    def refuses(self, entry: Entry) -> str | None:
        return self.servers[0].refuses(entry)

    async def start(self) -> None:
        await asyncio.gather(*(server.start() for server in self.servers))

    async def load(self, entry: Entry) -> None:
        """On every server; those that are away load it later, when they are asked for it."""
        outcomes = await asyncio.gather(*(server.load(entry) for server in self.servers), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if len(failures) == len(outcomes) or not isinstance(failure, BackendUnavailableError | DeadlineError):
                raise failure

    def check_room(self, entry: Entry) -> None:
        """What waits in Triton is not known here; its refusal is that of `infer`."""

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        first = self._choose()
        try:
            return await self._ask(first, entry, inputs, ticket)
        except BackendUnavailableError:
            second = self._choose(besides=first)
            if second == first or not ticket.live:
                raise
        return await self._ask(second, entry, inputs, ticket)

    async def generate(self, entry: Entry, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        """The tokens of one server; an answer that has begun is not begun anew on another."""
        first = self._choose()
        begun = False
        try:
            async with aclosing(self._listen(first, entry, prompt, sampling)) as events:
                async for event in events:
                    begun = True
                    yield event
            return
        except BackendUnavailableError:
            second = self._choose(besides=first)
            if begun or second == first:
                raise
        async with aclosing(self._listen(second, entry, prompt, sampling)) as events:
            async for event in events:
                yield event

    async def unload(self, entry: Entry) -> None:
        await asyncio.gather(*(server.unload(entry) for server in self.servers))

    async def fault(self) -> str | None:
        faults = await asyncio.gather(*(server.fault() for server in self.servers))
        return None if None in faults else "; ".join(filter(None, faults))

    def troubles(self) -> list[str]:
        return [trouble for server in self.servers for trouble in server.troubles()]

    async def close(self) -> None:
        for task in self._mending.values():
            task.cancel()
        await asyncio.gather(*self._mending.values(), return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers))

    def _choose(self, besides: int | None = None) -> int:
        """Of those that answer the one with the fewest calls in flight, in turn among equals; `besides` comes last."""
        count = len(self.servers)
        self._turn = (self._turn + 1) % count
        return min(
            ((index + self._turn) % count for index in range(count)),
            key=lambda index: (index == besides, self.servers[index].breaker.open, self._in_flight[index]),
        )

    async def _ask(self, index: int, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        with self._called(index, entry):
            return await self.servers[index].infer(entry, inputs, ticket)

    async def _listen(self, index: int, entry: Entry, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        with self._called(index, entry):
            async with aclosing(self.servers[index].generate(entry, prompt, sampling)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _called(self, index: int, entry: Entry) -> Iterator[None]:
        """One more call in flight; a server that turns out to be without the model is asked to load it."""
        self._in_flight[index] += 1
        try:
            yield
        except BackendUnavailableError:
            if not self.servers[index].breaker.open and (index, str(entry)) not in self._mending:
                self._mend(index, entry)
            raise
        finally:
            self._in_flight[index] -= 1

    def _mend(self, index: int, entry: Entry) -> None:
        """Load the entry on a server that answers, but was away when everybody else did."""
        key = (index, str(entry))

        async def load() -> None:
            with suppress(VitrineError):
                await self.servers[index].load(entry)

        self._mending[key] = asyncio.create_task(load())
        self._mending[key].add_done_callback(lambda _: self._mending.pop(key, None))
