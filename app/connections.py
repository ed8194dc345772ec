"""What lies below a request: how many connections there may be, and how long one may keep the server waiting.

uvicorn gives a connection all the time in the world for its headers, for the rest of a body that nobody wants any more and for
taking its answer, takes headers of any size, and closes so that an answer can be lost under a body that is still coming. All of
that is mended here.
"""

import asyncio
import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.admission import Pace

log = logging.getLogger("vitrine.connections")

SWEEP_SECONDS = 0.5
LINGER_SECONDS = 2.0  # for a client to read the last answer, once nothing more is read of what it sends
MAX_HEADER_BYTES = 64 * 1024  # of one request, beyond the piece in which they begin
OTHER_FILES = 256  # descriptors that are no connections of clients: models, logs, pipes, connections to Triton
REFUSAL = "connection: close\r\nretry-after: 1\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\n\r\n{text}"


class Connection(HttpToolsProtocol):
    """One client's connection. `sweep` is called every now and then and ends what waits for the client too long."""

    max_connections = sys.maxsize
    pace = Pace()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._since = self.loop.time()  # it waits for a request
        self._lingers_until: float | None = None
        self._header_bytes = 0  # of headers that have begun and not ended
        self._taking: tuple[float, int, int] | None = None  # since when, bytes unsent then, bytes unsent when last looked
        self._wire = transport
        super().connection_made(_Unhurried(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.max_connections and not self._take_over():
            self._refuse("503 Service Unavailable", f"This server takes {self.max_connections} connections; retry later.")

    def data_received(self, data: bytes) -> None:
        if self._lingers_until is not None:
            return
        if self._idles():
            self._since = self.loop.time()
        began = self._in_headers
        super().data_received(data)
        self._header_bytes = self._header_bytes + len(data) if began and self._in_headers else 0
        if self._header_bytes > MAX_HEADER_BYTES and not self.leaving:
            self._refuse("431 Request Header Fields Too Large", f"The headers of a request have at most {MAX_HEADER_BYTES} bytes.")
        if self._waits and self.timeout_keep_alive_task is None and not self.leaving:  # the rest of a body came behind its answer
            self._since = self.loop.time()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle is not None:
            self.cycle.more_body = False

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        if self.cycle.response_complete:  # else it is the next request's
            self.cycle.body = bytearray()  # of one that was refused before it was read
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # the timer would hold all this until it rings

    def leave(self) -> None:
        """Close. Under a body that is still coming, first say that no more is sent, and read on so that nothing is reset."""
        if self._lingers_until is not None or self._wire.is_closing():
            return
        if self.cycle is None or not self.cycle.more_body:
            self._wire.close()
        else:
            self._linger()

    def _take_over(self) -> bool:
        """Close the connection that has been idle the longest, if there is one, so that this one need not be refused."""
        idle = [
            other
            for other in self.connections
            if isinstance(other, Connection) and other._idles() and not other.leaving and not other._wire.get_write_buffer_size()
        ]
        if idle:
            min(idle, key=lambda other: other._since).leave()
        return bool(idle)

    @property
    def _in_headers(self) -> bool:
        """The headers of a request have begun and not ended."""
        return self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)

    @property
    def _waits(self) -> bool:
        """The last request has its answer and has come to its end, and no other has begun."""
        return self.cycle is not None and self.cycle.response_complete and not self.cycle.more_body and not self._in_headers

    @property
    def leaving(self) -> bool:
        return self._lingers_until is not None or self._wire.is_closing()

    def sweep(self, now: float) -> None:
        """`now` is a value of the loop's time."""
        if self._lingers_until is not None:
            if now > self._lingers_until:
                self._wire.abort()
        elif self._takes_too_slowly(now):
            log.info("closed a connection that did not take its answer")
            self._wire.abort()
        elif now - self._since > self.pace.grace and (self.cycle is None or self.cycle.response_complete) and not self._idles():
            self._end_waiting()

    def _idles(self) -> bool:
        """Nothing has come since the last request's end and answer: uvicorn's own time for that runs."""
        return self.timeout_keep_alive_task is not None and self._waits

    def _end_waiting(self) -> None:
        if self._in_headers:
            self._refuse("408 Request Timeout", "The headers of the request did not come in time.")
        else:  # it has sent nothing at all, or still sends the body of a request that was answered
            self._wire.abort()

    def _takes_too_slowly(self, now: float) -> bool:
        unsent = self._wire.get_write_buffer_size()
        if not unsent:
            self._taking = None
        elif self._taking is None or unsent > self._taking[2]:  # an answer, or more of it
            self._taking = (now, unsent, unsent)
        else:
            since, at_first, _ = self._taking
            self._taking = (since, at_first, unsent)
            return now - since > self.pace.due(at_first - unsent)
        return False

    def _refuse(self, status: str, text: str) -> None:
        self._wire.write(f"HTTP/1.1 {status}\r\n{REFUSAL.format(length=len(text), text=text)}".encode())
        self._linger()

    def _linger(self) -> None:
        self._lingers_until = self.loop.time() + LINGER_SECONDS
        self.flow.resume_reading()
        if self._wire.can_write_eof():
            self._wire.write_eof()


class _Unhurried:
    """The transport as uvicorn gets it: to close it is to `leave`."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.leaving

    def close(self) -> None:
        self._connection.leave()


def connection_class(max_connections: int, pace: Pace) -> type[Connection]:
    """What uvicorn makes of every connection. No more are taken than the process may have open files."""
    fitting = min(max_connections, _allow_files(max_connections + OTHER_FILES) - OTHER_FILES)
    if fitting < max_connections:
        log.warning("%d connections at most: the limit of open files allows no more", fitting)
    return type("LimitedConnection", (Connection,), {"max_connections": max(1, fitting), "pace": pace})


def _allow_files(wanted: int) -> int:
    """Raise this process's own limit of open files to `wanted` where it may; gives what it is then."""
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415 -- there is none on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        return wanted if soft == resource.RLIM_INFINITY else soft
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed
    return soft


async def sweep(connections: Iterable[Any]) -> None:
    """End for ever what waits for its client too long; `connections` are those of the server at any time."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        now = asyncio.get_running_loop().time()
        for connection in tuple(connections):
            try:
                connection.sweep(now)
            except Exception:
                log.exception("a connection could not be looked at")
