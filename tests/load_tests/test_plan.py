"""The plan of a comparison: every cell once, one start for what can share it, and no longer than promised."""

from itertools import chain

import pytest

from load_tests import plan, sweep
from load_tests.bench import main
from load_tests.cells import FLOOR, Cell, full, headline
from load_tests.plan import Start, expected, in_turn, minutes, start_of, starts
from load_tests.servers import Tuning


def test_the_headline_takes_no_more_than_fifteen_minutes() -> None:
    assert 10 < minutes(headline(), rounds=3, seconds=3.0) <= 14.5  # half a minute for the report


@pytest.mark.parametrize("cells", [headline(), full()])
def test_every_cell_is_measured_once_in_each_round(cells: list[Cell]) -> None:
    groups = starts(cells)
    for number in (1, 2, 3):
        measured = list(chain.from_iterable(members for _, members in in_turn(groups, number)))
        assert sorted(measured, key=str) == sorted(cells, key=str)
    assert len({in_turn(groups, number)[0][0] for number in (1, 2, 3)}) == 3


def test_rows_that_differ_only_in_what_is_sent_share_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"server": "vitrine", "goal": "throughput", "tuning": {"workers": 2, "batch": 1, "wait": 0.0, "threads": 1}, "rate": 9.0}
    monkeypatch.setattr(sweep, "load", lambda: [two])
    names = ("vitrine", "vitrine, multipart", "vitrine, base64")
    assert {start_of(Cell(name, "small", "500x334", 32)) for name in names} == {Start("vitrine", "small", "usual", Tuning(2))}
    assert start_of(Cell("vitrine", "small", "500x334", 1)) == start_of(Cell("vitrine, one process", "small", "12mp", 32))
    apart = {
        start_of(Cell(name, "small", "500x334", 32)) for name in ("litserve", "litserve, vitrine's decoding", "fastapi", FLOOR)
    }
    assert len(apart) == 4


def test_what_takes_little_memory_comes_first() -> None:
    cells = [Cell("litserve", "small", photo, clients) for clients in (32, 1) for photo in ("12mp", "500x334")]
    order = [(cell.clients, cell.photo) for members in starts(cells).values() for cell in members]
    assert order.index((32, "500x334")) < order.index((32, "12mp"))


def test_more_rounds_and_longer_cells_take_longer() -> None:
    cells = headline()
    assert minutes(cells, 6, 3.0) == pytest.approx(2 * minutes(cells, 3, 3.0))
    served = [Cell("litserve", "small", "500x334", 32)]
    (start,) = starts(served)
    assert expected(start, served, 5.0) - expected(start, served, 3.0) == pytest.approx(2.0)
    assert expected(start, [*served, *served], 3.0) - expected(start, served, 3.0) == pytest.approx(3.0 + plan.SETTLE)


def test_a_dry_run_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main(dry_run=True)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("3 rounds of ")
    assert "vitrine, multipart, small, 500x334, 32 clients" in printed
