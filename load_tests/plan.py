"""What a run does in which order, and how long that takes: one start of a server for all cells that it can serve."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from load_tests import floor, sweep
from load_tests.cells import FLOOR, TRITON, VITRINE_ON_TRITON, Cell
from load_tests.images import PHOTOS
from load_tests.servers import CONTENDERS, Tuning

WARM_UP = 1.0  # seconds, once for each start
LARGE_PHOTO = 2.0  # times as long, because far fewer answers come
SETTLE = 0.8  # seconds until a server rests before a load, and was looked at
FIRST_LOOK = 2.0  # seconds: bare Triton's client starts, and measures decoding and resizing
STARTS = {FLOOR: 11.0, "vitrine": 2.5, "fastapi_plain": 3.5, "litserve": 5.5, "bentoml": 6.5, "ray_serve": 13.0, "mlserver": 7.5}
STARTS |= {TRITON: 9.0}
"""Seconds from a start to the first answer and for the end: what runs of 24 November 2026 took on 2 cores of an AMD EPYC."""


@dataclass(frozen=True)
class Start:
    """One start: the kind of server, the model, and for all but the floor and Triton the settings and whose decoding it is."""

    kind: str
    model: str
    decode: str = ""
    tuning: Tuning = field(default_factory=Tuning)


def start_of(cell: Cell) -> Start:
    """The start that serves a cell: rows which differ only in what the client sends share one."""
    if cell.server == FLOOR:
        return Start(FLOOR, cell.model)
    if cell.server in (TRITON, VITRINE_ON_TRITON):
        return Start(TRITON, cell.model)
    contender = CONTENDERS[cell.server]
    goal = "latency" if cell.clients == 1 else "throughput"
    return Start(contender.kind, cell.model, contender.decode, sweep.best(sweep.load(), contender, goal))


def starts(cells: Iterable[Cell]) -> dict[Start, list[Cell]]:
    """The cells of each start, those first that take the least memory: its growth is then the later cells'."""
    found: dict[Start, list[Cell]] = {}
    for cell in cells:
        found.setdefault(start_of(cell), []).append(cell)
    photos = list(PHOTOS)
    return {start: sorted(those, key=lambda cell: (cell.clients, photos.index(cell.photo))) for start, those in found.items()}


def in_turn(groups: Mapping[Start, list[Cell]], number: int) -> list[tuple[Start, list[Cell]]]:
    """Each round begins a third further on, so that no server is always measured on the same state of the machine."""
    items = list(groups.items())
    first = (number - 1) * len(items) // 3 % len(items)
    return items[first:] + items[:first]


def duration(cell: Cell, seconds: float) -> float:
    """How long the load of a cell lasts."""
    return seconds * LARGE_PHOTO if cell.photo == "12mp" else seconds


def expected(start: Start, cells: Iterable[Cell], seconds: float) -> float:
    """Seconds for one start with these cells."""
    warm_up = 0.0 if start.kind in (FLOOR, TRITON) else WARM_UP
    return STARTS[start.kind] + warm_up + sum(_expected(cell, seconds) for cell in cells)


def minutes(cells: Iterable[Cell], rounds: int, seconds: float) -> float:
    """What a run is expected to take once models and environments are there."""
    return rounds * sum(expected(start, those, seconds) for start, those in starts(cells).items()) / 60


def _expected(cell: Cell, seconds: float) -> float:
    if cell.server == FLOOR:
        return len(floor.BATCHES) * (floor.WARM_UP + duration(cell, seconds) / 2)
    if cell.server == TRITON:
        return FIRST_LOOK + seconds
    gateway = STARTS["vitrine"] + WARM_UP if cell.server == VITRINE_ON_TRITON else 0.0
    return gateway + SETTLE + duration(cell, seconds)
