"""What a run finds, and whether it reaches the targets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from load_tests.evaluate import Estimate, Rounds, Verdict, estimate, judge, ratio
from load_tests.tokenizers.ways import HEADLINE, WAYS, Way

HTTP, FLOOR, TORCH = "http", "floor", "torch"
ENGINES = (HTTP, FLOOR, TORCH)
TARGETS = {FLOOR: (0.9, "of the floor"), TORCH: (1.0, "x the best torch setting")}


@dataclass(frozen=True)
class Record:
    """One measurement. Rate: images/s; latencies: ms; cpu: processor seconds per image; `failure` says why there is no figure."""

    model: str
    way: Way
    engine: str
    round: int
    rate: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    cpu: float = 0.0
    setting: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Peak:
    """Resident bytes of a loaded engine, and what the peak of 1 and of 8 images at a time lies above it."""

    model: str
    role: str
    engine: str
    loaded: int = 0
    above_1: int = 0
    above_8: int = 0
    failure: str = ""


def rows(records: Iterable[Record], model: str, way: Way, engine: str) -> list[Record]:
    """The rounds of one row, without failures."""
    return [each for each in records if (each.model, each.way, each.engine) == (model, way, engine) and not each.failure]


def median(found: Sequence[Record], figure: Callable[[Record], float]) -> Estimate:
    return estimate([figure(record) for record in found])


def models(records: Iterable[Record]) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(record.model for record in records))


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Both targets of every model; torch neither packs nor encodes, so that it has one row for each direction."""
    found = []
    for model in models(records):
        for way in WAYS:
            engines = (FLOOR, TORCH) if way in HEADLINE else (FLOOR,)
            found += [_verdict(records, model, way, engine) for engine in engines]
    return found


def _verdict(records: Sequence[Record], model: str, way: Way, engine: str) -> Verdict:
    limit, of = TARGETS[engine]
    over = ratio(_rounds(rows(records, model, way, HTTP)), _rounds(rows(records, model, way, engine)))
    met = None if over is None else judge(over.value, "at least", limit)
    return Verdict(f"{model}, {way}", f"at least {limit:g} {of}", over, met)


def _rounds(found: Sequence[Record]) -> Rounds:
    return {record.round: record.rate for record in found}
