"""The first stage of a request: a ticket before its body is read, and ceilings on what is in flight.

A client that is slow with its body holds a ticket, but none of the places of those whose body is there.
"""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType

from app import metrics
from app.errors import CapacityError, DeadlineError, ShuttingDownError, TooLargeError

EXPIRED = "The request's time ran out; send fewer or smaller images, or allow more time."


@dataclass(eq=False)
class Ticket:
    """What a request carries through the pipeline: its id, deadline, cancellation and the time spent per stage.

    `deadline` is a value of `time.monotonic()`, and so is `asked`, after which the client wants no answer. `cancelled` means that
    nobody waits for the answer, `departed` that the client hung up. `placed` tells whether it holds one of the server's places,
    `bytes` what its body holds in memory. `model` is the name of the model that answers, once it is found. `stages` holds seconds;
    the images of one request add up. While a trace is recorded, `spans` holds every stretch of a stage as (stage, began, ended),
    times of `time.perf_counter()`, and `context` the headers that hand the trace on to other servers.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    deadline: float = float("inf")
    asked: float = float("inf")
    cancelled: bool = False
    departed: bool = False
    placed: bool = False
    bytes: int = 0
    model: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] | None = None
    context: Mapping[str, str] | None = None

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def live(self) -> bool:
        """False once nobody waits for the answer any more."""
        return not self.cancelled and time.monotonic() < self.deadline

    def check(self) -> None:
        """Raise DeadlineError when the time is over."""
        if time.monotonic() >= self.deadline:
            raise DeadlineError(EXPIRED)

    def allow(self, seconds: float) -> None:
        """Count the time anew: `seconds` from now, but no longer than the client asked for."""
        self.deadline = min(time.monotonic() + seconds, self.asked)

    def within_deadline(self) -> "_WithinDeadline":
        """Cancel the block when the time is over and raise DeadlineError."""
        return _WithinDeadline(None if self.deadline == float("inf") else self.remaining)

    def wait(self, seconds: float) -> None:
        """Add to the stage `queue` what an image waited for a thread; a trace shows it as a gap."""
        self.stages["queue"] = self.stages.get("queue", 0.0) + seconds

    def record(self, stage: str, seconds: float, ended: float | None = None) -> None:
        """Add to the time of a stage that ended at `ended` of `time.perf_counter()`, by default just now."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        if self.spans is not None:
            ended = time.perf_counter() if ended is None else ended
            self.spans.append((stage, ended - seconds, ended))

    def stage(self, name: str) -> "Timing":
        """Time the block as (a part of) a stage."""
        return Timing(self, name)


class Timing:
    """A block whose time is recorded on a ticket; a class, since it is entered a dozen times in a request."""

    __slots__ = ("_stage", "_started", "_ticket")

    def __init__(self, ticket: Ticket, stage: str) -> None:
        self._ticket = ticket
        self._stage = stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        ended = time.perf_counter()
        self._ticket.record(self._stage, ended - self._started, ended)


class _WithinDeadline:
    """`asyncio.timeout` with the error of this server."""

    __slots__ = ("_timeout",)

    def __init__(self, seconds: float | None) -> None:
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as expired:
            raise DeadlineError(EXPIRED) from expired


@dataclass(frozen=True)
class Pace:
    """How slow a client may be: from `grace` seconds on, it must have sent or taken `rate` bytes per second on average."""

    grace: float = 10.0
    rate: float = 1024.0

    def due(self, size: int) -> float:
        """Seconds from the beginning until when the byte that follows the first `size` must have moved."""
        return self.grace + size / self.rate


class Admission:
    """Counts requests and body bytes in flight; full is an error at once, before any work. Event loop only.

    `requests` hold one of `max_requests` places; `tickets` counts them and those whose body is still coming. Set `stopping` when
    the server is about to end and should get no more traffic, and `closed` when it takes none any more.
    """

    def __init__(self, max_requests: int, max_bytes: int, longest: float, pace: Pace = Pace()) -> None:
        """`longest`: seconds that a request has, of which it may ask for fewer. `pace`: of its body."""
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.longest = longest
        self.pace = pace
        self.requests = 0
        self._waiting: deque[asyncio.Future[None]] = deque()  # for a place; while there are any, all places are taken
        self.tickets = 0
        self.bytes = 0
        self.stopping = False
        self.closed = False

    @property
    def full(self) -> bool:
        """Every place is taken."""
        return self.requests >= self.max_requests

    @contextmanager
    def admit(self, request_id: str | None = None, timeout: float | None = None) -> Iterator[Ticket]:
        """Take one of `max_requests` places, for `timeout` seconds but no longer than the longest.

        Raises:
            ShuttingDownError: the server takes no more requests.
            CapacityError: every place is taken.
        """
        if self.closed:
            raise ShuttingDownError("This server is shutting down; retry, on another connection.")
        ticket = Ticket() if request_id is None else Ticket(id=request_id)
        if timeout is not None:
            ticket.asked = time.monotonic() + timeout
        ticket.allow(self.longest)
        self.take_place(ticket)
        self.tickets += 1
        metrics.IN_FLIGHT.set(self.tickets)
        try:
            yield ticket
        finally:
            ticket.cancelled = True
            self.leave_place(ticket)
            self.tickets -= 1
            metrics.IN_FLIGHT.set(self.tickets)
            self.bytes -= ticket.bytes

    def take_place(self, ticket: Ticket) -> None:
        """Take one of the places.

        Raises:
            CapacityError: every place is taken.
        """
        if self.full:
            raise CapacityError(
                f"{self.max_requests} requests are in flight, the most this server takes; retry later.", reason="requests"
            )
        self.requests += 1
        ticket.placed = True

    async def await_place(self, ticket: Ticket) -> None:
        """Take a place, or the next that is given back: what has been read is not refused for those who came meanwhile.

        Raises:
            CapacityError: every place is taken, and as many requests wait.
            DeadlineError: the ticket's time ran out.
        """
        if not self.full or len(self._waiting) >= self.max_requests:
            self.take_place(ticket)
            return
        given = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        try:
            async with ticket.within_deadline():
                await given
        except (asyncio.CancelledError, DeadlineError):
            if given.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(given)
            else:
                self._give_back_place()
            raise
        ticket.placed = True

    def leave_place(self, ticket: Ticket) -> None:
        """Let others have the place while this request waits for its client; harmless without one."""
        if ticket.placed:
            ticket.placed = False
            self._give_back_place()

    def _give_back_place(self) -> None:
        while self._waiting:
            if not (given := self._waiting.popleft()).done():
                given.set_result(None)
                return
        self.requests -= 1

    def take_bytes(self, ticket: Ticket, count: int) -> None:
        """Count `count` more bytes of request body against the ceiling, until the ticket is given back.

        Raises:
            CapacityError: the bodies in flight would exceed `max_bytes`.
        """
        if self.bytes + count > self.max_bytes:
            raise CapacityError("The request bodies in flight fill the memory set aside for them; retry later.", reason="bytes")
        self.bytes += count
        ticket.bytes += count


class PixelBudget:
    """A ceiling on decoded pixels in memory. Waiting for room happens on the event loop, in turn, and holds up no thread."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._lock = threading.Lock()
        self._used = 0
        self._waiting: deque[_Claim] = deque()

    @property
    def used(self) -> int:
        return self._used

    def try_take(self, pixels: int) -> bool:
        """Take `pixels` where they fit and nobody waits; on any thread.

        Raises:
            TooLargeError: one image is larger than the whole budget.
        """
        if pixels > self.max_pixels:
            raise TooLargeError(f"The image decodes to {pixels} pixels; this server holds at most {self.max_pixels} at a time.")
        with self._lock:
            fits = not self._waiting and self._used + pixels <= self.max_pixels
            self._used += pixels if fits else 0
        return fits

    async def take(self, pixels: int) -> None:
        """Wait in turn until `pixels` fit, and take them.

        Raises:
            TooLargeError: one image is larger than the whole budget.
        """
        if self.try_take(pixels):
            return
        loop = asyncio.get_running_loop()
        claim = _Claim(pixels, loop, loop.create_future())
        with self._lock:
            self._waiting.append(claim)
            self._grant()
        try:
            await claim.granted
        except asyncio.CancelledError:
            with self._lock:
                if claim in self._waiting:
                    self._waiting.remove(claim)
                else:
                    self._used -= pixels
                self._grant()
            raise

    def give_back(self, pixels: int) -> None:
        """On any thread."""
        with self._lock:
            self._used -= pixels
            self._grant()

    def _grant(self) -> None:
        while self._waiting and self._used + self._waiting[0].pixels <= self.max_pixels:
            claim = self._waiting.popleft()
            self._used += claim.pixels
            claim.loop.call_soon_threadsafe(claim.settle)


@dataclass(eq=False)
class _Claim:
    """An image that waits for its pixels."""

    pixels: int
    loop: asyncio.AbstractEventLoop
    granted: "asyncio.Future[None]"

    def settle(self) -> None:
        if not self.granted.done():
            self.granted.set_result(None)
