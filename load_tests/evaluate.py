"""What the records say: medians over rounds, ratios paired by round with bootstrap intervals, and the targets met or missed."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from load_tests.cells import FLOOR, PEERS, TRITON, VITRINE_ON_TRITON, Cell, Record

RESAMPLES = 10_000
Rounds = Mapping[int, float]
"""One figure per round."""


@dataclass(frozen=True)
class Estimate:
    """A median with the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured; `estimate` is None where a row of it is missing."""

    work: str
    goal: str
    estimate: Estimate | None
    met: bool | None


class Table:
    """The records of one run, without failures, by cell."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.cells: dict[Cell, dict[int, Record]] = {}
        for record in records:
            if not record.failure:
                self.cells.setdefault(record.cell, {})[record.round] = record

    def rounds(self, cell: Cell, figure: Callable[[Record], float]) -> Rounds:
        return {number: figure(record) for number, record in self.cells.get(cell, {}).items()}


def estimate(values: Sequence[float]) -> Estimate:
    """The median of at least one value. With few rounds the interval is wide and reaches from the least to the largest."""
    samples = np.random.default_rng(0).choice(np.asarray(values, float), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return Estimate(statistics.median(values), float(low), float(high))


def ratio(above: Rounds, below: Rounds) -> Estimate | None:
    """above / below, paired by round; None where they share no round."""
    shared = sorted(set(above) & set(below))
    return estimate([above[number] / below[number] for number in shared]) if shared else None


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Every target that wrk and process times decide."""
    table = Table(records)
    main = ("small", "500x334", 32)
    floor, vitrine = Cell(FLOOR, *main), Cell("vitrine", *main)
    found = [
        _verdict("processor time per image", "at most", 1.25, "the floor's", _ratio(table, vitrine, floor, _cpu)),
        _verdict(
            "throughput, small net, 500x334, 32 clients", "at least", 0.75, "of the floor", _ratio(table, vitrine, floor, _rate)
        ),
    ]
    for peer in PEERS:
        over = _ratio(table, vitrine, Cell(peer, *main), _rate)
        found.append(_verdict("throughput, small net, 500x334, 32 clients", "at least", 2.3, f"x {peer}", over))
    for photo in ("1920x1281", "12mp"):
        here = Cell("vitrine", "small", photo, 32)
        work = f"throughput, small net, {photo}, 32 clients"
        found.append(_verdict(work, "at least", 0.85, "of the floor", _ratio(table, here, Cell(FLOOR, "small", photo, 32), _rate)))
        found.append(
            _verdict(work, "at least", 4.0, "x litserve", _ratio(table, here, Cell("litserve", "small", photo, 32), _rate))
        )
    medium = Cell("vitrine", "medium", "500x334", 32)
    over = _ratio(table, medium, Cell(FLOOR, "medium", "500x334", 32), _rate)
    found.append(_verdict("throughput, medium net, 500x334, 32 clients", "at least", 0.92, "of the floor", over))
    best = _best_peer(table)
    over = _ratio(table, Cell("vitrine", "medium", "500x334", 1), Cell(best, "medium", "500x334", 1), _p50) if best else None
    found.append(_verdict("p50, medium net, 1 client", "at most", 1.05, f"x the best peer's ({best or 'none measured'})", over))
    found.append(_verdict("p50 over bare Triton, decoding and resizing, 1 client", "at most", 1.0, "ms", _over_triton(table)))
    return found


def judge(found: float, sense: Literal["at least", "at most"], limit: float) -> bool:
    return found >= limit if sense == "at least" else found <= limit


def _verdict(work: str, sense: Literal["at least", "at most"], limit: float, of: str, found: Estimate | None) -> Verdict:
    return Verdict(work, f"{sense} {limit:g} {of}", found, None if found is None else judge(found.value, sense, limit))


def _ratio(table: Table, above: Cell, below: Cell, figure: Callable[[Record], float]) -> Estimate | None:
    return ratio(table.rounds(above, figure), table.rounds(below, figure))


def _best_peer(table: Table) -> str | None:
    medians = {peer: table.rounds(Cell(peer, "medium", "500x334", 1), _p50) for peer in PEERS}
    return min(
        (peer for peer in medians if medians[peer]), key=lambda peer: statistics.median(medians[peer].values()), default=None
    )


def _over_triton(table: Table) -> Estimate | None:
    bare = table.rounds(Cell(TRITON, "small", "500x334", 1), lambda record: record.p50 + record.prepare)
    ours = table.rounds(Cell(VITRINE_ON_TRITON, "small", "500x334", 1), _p50)
    shared = sorted(set(bare) & set(ours))
    return estimate([ours[number] - bare[number] for number in shared]) if shared else None


def _rate(record: Record) -> float:
    return record.rate


def _cpu(record: Record) -> float:
    return record.cpu


def _p50(record: Record) -> float:
    return record.p50
