"""Work in processes of their own: how fast, and how much memory at the peak."""

import ctypes
import gc
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import psutil

from load_tests import loops
from load_tests.loops import Speed, Work
from load_tests.tokenizers.ways import Tokenizer, Way

WORK = {
    "floor": ("load_tests.tokenizers.floor", "Floor"),
    "torch": ("load_tests.tokenizers.eager", "Eager"),
}
BATCHES = (1, 8)
LAYOUTS = ("contiguous", "channels_last")  # of torch
PEAK_STEPS = 3
WARM_UP = 0.5  # seconds, after a first step


@dataclass(frozen=True)
class Point:
    """One thing to measure: a way, images at a time, and for torch the memory layout."""

    way: Way
    batch: int
    layout: str = ""


@dataclass(frozen=True)
class Job:
    """The points that one set of processes measures, one after the other. Called in a process, it makes the work."""

    engine: str
    model: Tokenizer
    points: tuple[Point, ...]
    processes: int
    threads: int
    tokens: bytes

    def __call__(self) -> Work:
        module, name = WORK[self.engine]
        ways = tuple(dict.fromkeys(point.way for point in self.points))
        work: Work = getattr(import_module(module), name)(self.model, ways, self.threads, self.tokens)
        return work


@dataclass(frozen=True)
class Memory:
    """Resident bytes once loaded, and by how much they rose above that at the peak, by the number of images at a time."""

    loaded: int
    above: dict[int, int]


def speeds(job: Job, seconds: float) -> list[Speed]:
    """One for each point, of `seconds` at least.

    Raises:
        Whatever the making of the work or its steps raised.
    """
    return loops.speeds(job, [(point, seconds) for point in job.points], job.processes, min(WARM_UP, seconds))


def peaks(job: Job) -> Memory:
    """Of one process, with the way and the layout of the job's first point."""
    return loops.in_processes(_peaks, job, 1)[0]


def reset_peak(pid: int) -> None:
    """Let the kernel count a process's peak of resident memory from now on (Linux)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> int:
    """The most bytes that were resident since `reset_peak` (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(kibibytes)


def _peaks(job: Job) -> Memory:
    work, point, pid = job(), job.points[0], os.getpid()
    _give_back()
    loaded: int = psutil.Process(pid).memory_info().rss
    above: dict[int, int] = {}
    for batch in BATCHES:
        reset_peak(pid)
        for _ in range(PEAK_STEPS):
            work.step(Point(point.way, batch, point.layout))
        above[batch] = max(0, peak(pid) - loaded)
    return Memory(loaded, above)


def _give_back() -> None:
    """Return to the system what the loading has freed; the first steps would only take it again, and nothing be seen."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
