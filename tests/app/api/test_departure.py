"""When a client that hangs up ends the work, and when it is too late for that."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.admission import Ticket
from app.api.departure import cancelled_by_departure

pytestmark = pytest.mark.anyio


class Client:
    """Sends nothing more, and hangs up at some time."""

    def __init__(self) -> None:
        self.hung_up = asyncio.Event()
        self.request = Request({"type": "http"}, self.receive)

    async def receive(self) -> Message:
        await self.hung_up.wait()
        return {"type": "http.disconnect"}


async def test_work_that_nobody_waits_for_is_cancelled() -> None:
    client, ticket = Client(), Ticket()

    async def work() -> None:
        with cancelled_by_departure(client.request, ticket):
            await asyncio.sleep(60)

    working = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    client.hung_up.set()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ticket.departed
    assert not ticket.live


@pytest.mark.parametrize("turns", range(4))
async def test_work_that_is_done_is_not_cancelled_behind_its_end(turns: int) -> None:
    """In one of so many turns of the loop the work ends between the client's departure and the news of it."""
    client, ticket = Client(), Ticket()

    async def work() -> str:
        with cancelled_by_departure(client.request, ticket):
            await asyncio.sleep(0.01)
            client.hung_up.set()
            for _ in range(turns):
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    return "cancelled in the middle"
        await asyncio.sleep(0.01)
        return "sent"

    assert await asyncio.create_task(work()) == ("cancelled in the middle" if ticket.departed else "sent")
