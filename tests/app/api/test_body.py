"""Reading a body: what has come is not refused for what came meanwhile, and nobody waits for a client that has left."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.admission import Admission, Ticket
from app.api.body import is_heavy, read_body

pytestmark = pytest.mark.anyio


@pytest.fixture
def admission() -> Admission:
    return Admission(max_requests=1, max_bytes=1000, longest=5.0)


@pytest.fixture
def other(admission: Admission) -> Iterator[ExitStack]:
    """Whoever comes while the body of the first is still on its way."""
    with ExitStack() as stack:
        yield stack


def request(admission: Admission, other: ExitStack, left: asyncio.Event) -> Request:
    messages = iter([b"one ", b"two"])

    async def receive() -> Message:
        piece = next(messages, None)
        if piece is None:
            await left.wait()
            return {"type": "http.disconnect"}
        if piece == b"two":
            other.enter_context(admission.admit())
        return {"type": "http.request", "body": piece, "more_body": piece != b"two"}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def test_a_body_that_has_come_waits_for_a_place(admission: Admission, other: ExitStack) -> None:
    with admission.admit() as ticket:
        reading = asyncio.create_task(read_body(request(admission, other, asyncio.Event()), ticket, admission, 1000))
        await asyncio.sleep(0.05)
        assert not reading.done()
        other.close()
        assert await reading == b"one two"
        assert (ticket.placed, admission.requests) == (True, 1)
    assert admission.requests == 0


async def test_who_leaves_while_waiting_for_a_place_is_let_go(admission: Admission, other: ExitStack) -> None:
    left = asyncio.Event()

    async def read(ticket: Ticket) -> bytes:
        return await read_body(request(admission, other, left), ticket, admission, 1000)

    with admission.admit() as ticket:
        reading = asyncio.create_task(read(ticket))
        await asyncio.sleep(0.05)
        left.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 1)
        assert (ticket.departed, ticket.placed, admission.requests) == (True, False, 1)
    other.close()
    assert admission.requests == 0


def test_a_form_of_many_parts_is_heavy() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="labels"\r\n\r\nred\r\n'
    assert not is_heavy(part * 48)
    assert is_heavy(part * 200)
    assert is_heavy(bytes(300_000))
