"""Places, body bytes, deadlines and the pixel budget."""

import math
import threading
import time
from collections.abc import Callable

import pytest

from app.admission import Admission, PixelBudget, Ticket
from app.errors import CapacityError, DeadlineError, TooLargeError


@pytest.fixture
def admission() -> Admission:
    return Admission(max_requests=2, max_bytes=100, default_timeout=30.0)


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
    with admission.admit() as ticket:
        assert len(ticket.id) == 32
        assert 29 < ticket.remaining <= 30


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


def test_an_image_larger_than_the_budget_is_refused() -> None:
    budget = PixelBudget(100)
    with pytest.raises(TooLargeError, match="101 pixels; this server holds at most 100"), budget.hold(101, Ticket()):
        pass
    assert budget.used == 0


def test_pixels_are_given_back_even_when_decoding_fails() -> None:
    budget = PixelBudget(100)
    with budget.hold(100, Ticket()):
        assert budget.used == 100
    with pytest.raises(ValueError, match="stop"), budget.hold(100, Ticket()):
        raise ValueError("stop")
    assert budget.used == 0


def test_waiting_ends_with_the_deadline() -> None:
    budget = PixelBudget(100)
    started = time.monotonic()
    with budget.hold(60, Ticket()):
        with pytest.raises(DeadlineError), budget.hold(60, Ticket(deadline=started + 0.1)):
            pass
        assert 0.1 <= time.monotonic() - started < 1
        assert budget.used == 60


def test_an_image_waits_until_another_is_done() -> None:
    budget = PixelBudget(100)
    entered = threading.Event()

    def decode() -> None:
        with budget.hold(60, Ticket(deadline=time.monotonic() + 10)):
            entered.set()

    thread = threading.Thread(target=decode)
    with budget.hold(60, Ticket()):
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(0.5), "it was not told; by itself it looks once a second"
    thread.join()
    assert budget.used == 0


def test_the_budget_is_never_exceeded() -> None:
    budget = PixelBudget(100)
    seen: list[int] = []
    run_together([lambda pixels=pixels: hold_and_look(budget, pixels, seen) for pixels in (90, 50, 50, 40, 30, 30, 100, 1)])
    assert len(seen) == 8 * 5
    assert max(seen) <= 100
    assert budget.used == 0


def hold_and_look(budget: PixelBudget, pixels: int, seen: list[int]) -> None:
    for _ in range(5):
        with budget.hold(pixels, Ticket(deadline=time.monotonic() + 20)):
            time.sleep(0.001)
            seen.append(budget.used)


def run_together(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
