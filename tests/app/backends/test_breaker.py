"""When a server is left alone, and when it is asked again."""

import asyncio

import pytest
from prometheus_client import REGISTRY

from app.backends.breaker import Breaker

pytestmark = pytest.mark.anyio


class Server:
    """Alive or not; counts how often it was asked."""

    def __init__(self) -> None:
        self.alive = True
        self.probes = 0

    async def answers(self) -> bool:
        self.probes += 1
        await asyncio.sleep(0)
        return self.alive


def shown() -> float | None:
    return REGISTRY.get_sample_value("vitrine_circuit_open", {"address": "somewhere:1"})


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_failure_of_a_server_that_lives_changes_nothing() -> None:
    server = Server()
    breaker = Breaker("somewhere:1", server.answers)
    for _ in range(5):
        breaker.suspect()
    await until(lambda: server.probes == 1)
    await asyncio.sleep(0.01)
    assert (breaker.open, shown(), server.probes) == (False, 0, 1), "one probe for all who suspect at once"


async def test_a_dead_server_is_left_alone_until_it_answers() -> None:
    server = Server()
    server.alive = False
    breaker = Breaker("somewhere:1", server.answers, every=0.01)
    breaker.suspect()
    await until(lambda: breaker.open)
    assert shown() == 1
    await until(lambda: server.probes > 3)
    server.alive = True
    await until(lambda: not breaker.open)
    assert shown() == 0
    probes = server.probes
    await asyncio.sleep(0.05)
    assert server.probes == probes, "what answers is not probed"
    server.alive = False
    breaker.suspect()
    await until(lambda: breaker.open)
    await breaker.close()
