"""Work on a few items at once, with their answers in order: what lets a gateway form batches of one client's requests."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[tuple[T, "Future[R]"]]:
    """The items in order, each with its answer; up to `most` are worked on ahead, and those are waited for at the end."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(most) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) == most:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)
