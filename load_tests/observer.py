"""What a server holds while it is under load: memory, open files and threads of all its processes, looked at every now and then."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType

import psutil

from load_tests.processes import Server


@dataclass(frozen=True)
class Sample:
    """All processes of a server at one moment: `seconds` since watching began, proportional resident bytes, processor seconds."""

    seconds: float
    memory: int
    files: int
    threads: int
    cpu: float


class Observer:
    """Takes a sample every `step` seconds inside the `with` block, and one at its end."""

    def __init__(self, server: Server, step: float) -> None:
        self.samples: list[Sample] = []
        self._server = server
        self._step = step
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Observer":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(self._step):
            self._look()

    def _look(self) -> None:
        usage = self._server.usage()
        files = threads = 0
        for pid in self._server.pids():
            try:
                process = psutil.Process(pid)
                files += process.num_fds()
                threads += process.num_threads()
            except psutil.Error:
                continue
        self.samples.append(Sample(time.monotonic() - self._began, usage.memory, files, threads, usage.cpu))


@dataclass(frozen=True)
class Drift:
    """What a figure was at first, when the server was warm, and at last: medians of a fifth of the samples each."""

    first: float
    last: float

    @property
    def growth(self) -> float:
        return self.last / self.first - 1


def drift(figures: Sequence[float]) -> Drift:
    """The drift of `figures`, without the first tenth, in which a server warms up.

    Raises:
        ValueError: there are too few.
    """
    warm = figures[len(figures) // 10 :]
    if len(warm) < 2:
        raise ValueError(f"{len(figures)} samples say nothing of a drift; run for longer, or look more often.")
    fifth = max(1, len(warm) // 5)
    return Drift(statistics.median(warm[:fifth]), statistics.median(warm[-fifth:]))
