"""Work in a loop in processes of their own, all at once: images per second, and processor time."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
LOADING = 600.0  # seconds that the slowest process may take to be ready
LEAST_STEPS = 2


class Work(Protocol):
    """What a process does again and again."""

    def step(self, point: Any) -> int:
        """Do the work of `point` once, and give the number of images that it was."""


Make = Callable[[], Work]
"""Makes the work inside a process; to be pickled."""


@dataclass(frozen=True)
class Speed:
    """Images per second of all processes together, and processor seconds of one image."""

    rate: float
    cpu: float


def speeds(make: Make, points: Sequence[tuple[Any, float]], processes: int, warm_up: float) -> list[Speed]:
    """The speed at each of the points (what `Work.step` takes, and for how many seconds), one after the other.

    Raises:
        Whatever the work raised.
    """
    parts = in_processes(_time, (make, points, warm_up), processes)
    return [_together(of_point) for of_point in zip(*parts, strict=True)]


def in_processes(function: Callable[[Any], T], argument: object, processes: int) -> list[T]:
    """What `function` gives in each of some fresh processes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _set, (context.Barrier(processes),)) as pool:
        return pool.map(function, [argument] * processes, chunksize=1)


def _together(parts: Sequence[tuple[int, float, float]]) -> Speed:
    return Speed(sum(images / wall for images, wall, _ in parts), sum(p[2] for p in parts) / sum(p[0] for p in parts))


_barrier: Barrier | None = None


def _set(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 -- a barrier reaches a spawned process only when it starts
    _barrier = barrier


def _time(argument: tuple[Make, Sequence[tuple[Any, float]], float]) -> list[tuple[int, float, float]]:
    """(images, wall seconds, processor seconds) of one process at each point."""
    make, points, warm_up = argument
    assert _barrier is not None
    try:
        work = make()
        found = []
        for point, seconds in points:
            work.step(point)
            _barrier.wait(LOADING)
            _loop(work, point, warm_up, least=0)
            cpu, started = time.process_time(), time.perf_counter()
            images = _loop(work, point, seconds, least=LEAST_STEPS)
            found.append((images, time.perf_counter() - started, time.process_time() - cpu))
    except BaseException:
        _barrier.abort()  # the others need not wait for it
        raise
    return found


def _loop(work: Work, point: Any, seconds: float, least: int) -> int:
    """Images done in `seconds`, and in `least` steps at least."""
    until = time.perf_counter() + seconds
    images = steps = 0
    while steps < least or time.perf_counter() < until:
        images += work.step(point)
        steps += 1
    return images
