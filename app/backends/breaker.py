"""The circuit breaker of one inference server: found dead, it is left alone until it answers again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from app import metrics

log = logging.getLogger("vitrine.breaker")

PROBE_SECONDS = 0.25  # between two probes of a server that does not answer


class Breaker:
    """`open` while the server does not answer, so that nobody need find that out by waiting.

    A failure only makes the server suspect. Whether it is alive decides a probe, at once and then every `every` seconds.
    """

    def __init__(self, address: str, alive: Callable[[], Awaitable[bool]], *, every: float = PROBE_SECONDS) -> None:
        self.address = address
        self.open = False
        self._alive = alive
        self._every = every
        self._probing: asyncio.Task[None] | None = None
        self._gauge = metrics.CIRCUIT_OPEN.labels(address)
        self._gauge.set(0)

    def suspect(self) -> None:
        """A call has failed or run out of time: find out whether the server is to blame."""
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe())

    async def close(self) -> None:
        """End the probes."""
        if self._probing is not None:
            self._probing.cancel()
            with suppress(asyncio.CancelledError):
                await self._probing

    async def _probe(self) -> None:
        try:
            while not await self._alive():
                self._set(True)
                await asyncio.sleep(self._every)
            self._set(False)
        finally:
            self._probing = None

    def _set(self, value: bool) -> None:
        if value != self.open:
            self.open = value
            self._gauge.set(value)
            log.warning("%s %s", self.address, "does not answer and is left alone" if value else "answers again")
