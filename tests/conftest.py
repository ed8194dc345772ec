"""What every test shares."""

from collections.abc import AsyncIterator

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Coroutines marked `anyio` run on asyncio, as the gateway does."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Hold the event loop open, so that all tests run on one: gRPC has a single queue in a process, and tells the loop of a call
    that was given up of its end a moment after. That loop must not be closed, or the next one to look into the queue fails."""
    yield  # noqa: PT022 -- what returned would let go of the loop at once
