"""Places, body bytes, deadlines and the pixel budget."""

import asyncio
import math
import time

import pytest

from app.admission import Admission, PixelBudget, Ticket
from app.errors import CapacityError, DeadlineError, ShuttingDownError, TooLargeError

pytestmark = pytest.mark.anyio


@pytest.fixture
def admission() -> Admission:
    return Admission(max_requests=2, max_bytes=100, longest=30.0)


# Ticket


def test_a_ticket_has_an_id_of_its_own_and_no_deadline() -> None:
    first, second = Ticket(), Ticket()
    assert first.id != second.id
    assert first.remaining == math.inf
    assert first.live
    first.check()


def test_a_ticket_dies_at_its_deadline() -> None:
    ticket = Ticket(deadline=time.monotonic() - 1)
    assert ticket.remaining == 0
    assert not ticket.live
    with pytest.raises(DeadlineError):
        ticket.check()


def test_a_cancelled_ticket_is_not_live() -> None:
    ticket = Ticket()
    ticket.cancelled = True
    assert not ticket.live


def test_stages_add_up_and_are_recorded_when_they_fail() -> None:
    ticket = Ticket()
    ticket.record("decode", 1.0)
    ticket.record("decode", 0.5)
    with pytest.raises(ValueError, match="stop"), ticket.stage("resize"):
        raise ValueError("stop")
    assert ticket.stages["resize"] > 0
    assert ticket.stages["decode"] == 1.5
    with ticket.stage("resize"):
        time.sleep(0.01)
    assert 0.01 < ticket.stages["resize"] < 1


# Admission


def test_a_full_server_refuses_at_once_and_admits_again(admission: Admission) -> None:
    with admission.admit(), admission.admit():
        assert admission.requests == 2
        with pytest.raises(CapacityError, match="2 requests are in flight") as caught, admission.admit():
            pass
        assert caught.value.retry_after > 0
        assert admission.requests == 2
    assert admission.requests == 0
    with admission.admit():
        assert admission.requests == 1


def test_the_place_is_given_back_when_the_request_fails(admission: Admission) -> None:
    with pytest.raises(ValueError, match="stop"), admission.admit() as ticket:
        raise ValueError("stop")
    assert admission.requests == 0
    assert ticket.cancelled


def test_the_ticket_carries_id_and_deadline(admission: Admission) -> None:
    with admission.admit("mine", timeout=5) as ticket:
        assert ticket.id == "mine"
        assert 4 < ticket.remaining <= 5
    for timeout in (None, 60):
        with admission.admit(timeout=timeout) as ticket:
            assert len(ticket.id) == 32
            assert 29 < ticket.remaining <= 30


def test_time_that_is_counted_anew_is_no_more_than_the_client_asked_for(admission: Admission) -> None:
    for timeout, first, then in ((None, 30, 300), (100.0, 30, 100), (2.0, 2, 2)):
        with admission.admit(timeout=timeout) as ticket:
            assert first - 1 < ticket.remaining <= first
            ticket.allow(300.0)
            assert then - 1 < ticket.remaining <= then


def test_a_request_that_waits_for_its_client_holds_no_place(admission: Admission) -> None:
    with admission.admit() as slow, admission.admit() as other:
        admission.leave_place(slow)
        admission.leave_place(slow)
        assert (admission.requests, admission.tickets) == (1, 2)
        with admission.admit(), pytest.raises(CapacityError):
            admission.take_place(slow)
        admission.take_place(slow)
        assert admission.requests == 2
        admission.leave_place(other)
    assert (admission.requests, admission.tickets) == (0, 0)


async def test_what_has_been_read_waits_for_the_next_place(admission: Admission) -> None:
    with admission.admit() as slow, admission.admit() as other:
        admission.leave_place(slow)
        with admission.admit():
            waiting = asyncio.create_task(admission.await_place(slow))
            await asyncio.sleep(0)
            assert not waiting.done()
            admission.leave_place(other)
            with pytest.raises(CapacityError), admission.admit():
                pass
            await waiting
            assert (slow.placed, admission.requests) == (True, 2)
    assert (admission.requests, admission.tickets) == (0, 0)


@pytest.mark.parametrize("given", [False, True], ids=["still waiting", "just given one"])
async def test_who_leaves_while_waiting_for_a_place_holds_none(admission: Admission, given: bool) -> None:
    with admission.admit() as slow:
        admission.leave_place(slow)
        with admission.admit() as one, admission.admit():
            waiting = asyncio.create_task(admission.await_place(slow))
            await asyncio.sleep(0)
            if given:
                admission.leave_place(one)
            waiting.cancel()
            if not given:
                admission.leave_place(one)
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (slow.placed, admission.requests) == (False, 1)
    assert admission.requests == 0


async def test_waiting_for_a_place_has_an_end(admission: Admission) -> None:
    with admission.admit() as slow, admission.admit() as late:
        for ticket in (slow, late):
            admission.leave_place(ticket)
        late.deadline = time.monotonic() + 0.02
        with admission.admit(), admission.admit():
            waiting = [asyncio.create_task(admission.await_place(slow)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(CapacityError):
                await admission.await_place(late)
            for task in waiting:
                task.cancel()
            await asyncio.sleep(0)
            with pytest.raises(DeadlineError):
                await admission.await_place(late)
    assert (admission.requests, admission.tickets) == (0, 0)


def test_a_closed_server_takes_nothing_and_finishes_what_it_has(admission: Admission) -> None:
    with admission.admit() as ticket:
        admission.closed = True
        with pytest.raises(ShuttingDownError), admission.admit():
            pass
        admission.leave_place(ticket)
        admission.take_place(ticket)
    assert admission.tickets == 0


def test_body_bytes_have_a_ceiling_over_all_requests(admission: Admission) -> None:
    with admission.admit() as first:
        admission.take_bytes(first, 60)
        with admission.admit() as second:
            admission.take_bytes(second, 30)
            admission.take_bytes(second, 10)
            with pytest.raises(CapacityError, match="bodies"):
                admission.take_bytes(second, 1)
            assert admission.bytes == 100
        assert admission.bytes == 60
        admission.take_bytes(first, 40)
    assert admission.bytes == 0


# PixelBudget


async def test_an_image_larger_than_the_budget_is_refused() -> None:
    budget = PixelBudget(100)
    with pytest.raises(TooLargeError, match="101 pixels; this server holds at most 100"):
        budget.try_take(101)
    with pytest.raises(TooLargeError):
        await budget.take(101)
    assert budget.used == 0


async def test_what_does_not_fit_waits_until_pixels_are_given_back() -> None:
    budget = PixelBudget(100)
    assert budget.try_take(60)
    assert not budget.try_take(60)
    waiting = asyncio.create_task(budget.take(60))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await asyncio.to_thread(budget.give_back, 60)
    await asyncio.wait_for(waiting, 1)
    assert budget.used == 60


async def test_nobody_overtakes_one_who_waits() -> None:
    budget = PixelBudget(100)
    assert budget.try_take(60)
    large = asyncio.create_task(budget.take(90))
    await asyncio.sleep(0)
    assert not budget.try_take(10), "it would fit"
    small = asyncio.create_task(budget.take(10))
    await asyncio.sleep(0)
    budget.give_back(60)
    await asyncio.wait_for(asyncio.gather(large, small), 1)
    assert budget.used == 100


@pytest.mark.parametrize("granted", [False, True])
async def test_who_leaves_while_waiting_takes_nothing(granted: bool) -> None:
    budget = PixelBudget(100)
    assert budget.try_take(60)
    leaving, staying = asyncio.create_task(budget.take(60)), asyncio.create_task(budget.take(40))
    await asyncio.sleep(0)
    if granted:
        budget.give_back(60)  # it has its pixels, but has not heard of them
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.wait_for(staying, 1)
    assert budget.used == (40 if granted else 100)


async def test_the_budget_is_never_exceeded() -> None:
    budget = PixelBudget(100)
    seen: list[int] = []

    async def hold(pixels: int) -> None:
        for _ in range(5):
            await budget.take(pixels)
            await asyncio.to_thread(time.sleep, 0.001)
            seen.append(budget.used)
            await asyncio.to_thread(budget.give_back, pixels)

    await asyncio.gather(*(hold(pixels) for pixels in (90, 50, 50, 40, 30, 30, 100, 1)))
    assert len(seen) == 8 * 5
    assert max(seen) <= 100
    assert budget.used == 0
