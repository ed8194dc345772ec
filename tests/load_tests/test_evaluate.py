"""Ratios are paired by round, and a target is met or missed as its figures say."""

import pytest

from load_tests.cells import FLOOR, PEERS, TRITON, VITRINE_ON_TRITON, Cell, Record, headline
from load_tests.evaluate import Verdict, estimate, judge, ratio, verdicts

ROUNDS = (1, 2, 3)


def records(rate: float = 80.0, cpu: float = 1.2, p50: float = 10.0, over: float = 0.5) -> list[Record]:
    """A whole headline: the floor does 100 images/s at 1 s each, every peer 20 with a p50 of 10; bare Triton 5 + 2 ms."""
    found = []
    for cell in headline():
        for number in ROUNDS:
            figures = {"rate": 20.0, "cpu": 4.0, "p50": 10.0}
            if cell.server == FLOOR:
                figures = {"rate": 100.0, "cpu": 1.0}
            elif cell.server == TRITON:
                figures = {"p50": 5.0, "prepare": 2.0}
            elif cell.server == VITRINE_ON_TRITON:
                figures = {"p50": 7.0 + over}
            elif cell.server == "vitrine":
                figures = {"rate": rate, "cpu": cpu, "p50": p50}
            found.append(Record(cell, number, 5.0, **figures))
    return found


def missed(found: list[Verdict]) -> set[str]:
    return {f"{each.work}: {each.goal}" for each in found if each.met is False}


def test_every_target_is_met() -> None:
    found = verdicts(records(rate=95.0))
    assert all(each.met for each in found)
    assert len(found) == 14


@pytest.mark.parametrize(
    ("figures", "count"),
    [
        ({"rate": 90.0}, 1),  # the medium net's 0.92
        ({"rate": 80.0}, 3),  # and both large photos' 0.85
        ({"rate": 74.0}, 6),  # and 0.75 of the floor, and 4 x litserve twice
        ({"rate": 95.0, "cpu": 1.26}, 1),
        ({"rate": 95.0, "p50": 10.6}, 1),
        ({"rate": 95.0, "over": 1.01}, 1),
        ({"rate": 45.0}, 6 + len(PEERS)),
    ],
)
def test_what_falls_short_is_missed(figures: dict[str, float], count: int) -> None:
    assert len(missed(verdicts(records(**figures)))) == count


def test_a_target_without_its_rows_is_neither() -> None:
    found = verdicts([record for record in records(rate=95.0) if record.cell.server != "mlserver"])
    assert [(each.goal, each.estimate, each.met) for each in found if "mlserver" in each.goal] == [
        ("at least 2.3 x mlserver", None, None)
    ]


def test_a_failure_is_no_figure() -> None:
    failed = [Record(record.cell, record.round, 5.0, failure="it ended") for record in records() if record.cell.server == FLOOR]
    others = [record for record in records() if record.cell.server != FLOOR]
    assert next(each for each in verdicts([*others, *failed]) if "floor" in each.goal).met is None


def test_ratios_are_paired_by_round() -> None:
    found = ratio({1: 10.0, 2: 20.0, 3: 40.0}, {1: 5.0, 2: 10.0, 4: 1.0})
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    assert ratio({1: 1.0}, {2: 1.0}) is None


def test_the_interval_holds_the_median_and_narrows_with_rounds() -> None:
    few, many = estimate([1.0, 2.0, 3.0]), estimate([1.0, 2.0, 3.0] * 30)
    assert few.low <= few.value <= few.high
    assert (few.low, few.high) == (1.0, 3.0)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("found", "met"), [(1.25, True), (1.2500001, False)])
def test_the_limit_itself_is_met(found: float, met: bool) -> None:
    assert judge(found, "at most", 1.25) is met


def test_records_survive_the_file() -> None:
    record = Record(Cell("vitrine", "small", "500x334", 32), 1, 5.0, rate=1.5, setting="batch 8")
    assert Record.from_json(record.as_json()) == record
