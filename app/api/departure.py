"""A client that hangs up while its answer is made: nobody waits any more, and the work ends."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from app.admission import Ticket

CLIENT_CLOSED_REQUEST = 499


@contextmanager
def cancelled_by_departure(request: Request, ticket: Ticket) -> Iterator[None]:
    """Watch for the client to hang up (its body is read already); then the ticket is void and the work is cancelled."""
    working = asyncio.current_task()
    done = False

    def hung_up(_: "asyncio.Task[Any]") -> None:
        if done:  # in the same turn of the loop, when it is too late to take this call back
            return
        ticket.departed = ticket.cancelled = True
        if working is not None:
            working.cancel()

    watcher = asyncio.ensure_future(request.receive())
    watcher.add_done_callback(hung_up)
    try:
        yield
    finally:
        done = True
        watcher.cancel()
