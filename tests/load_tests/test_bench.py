"""A run that was interrupted goes on where it was, and its report has every row."""

from pathlib import Path

from load_tests import report
from load_tests.bench import Store
from load_tests.cells import Cell, Record, headline

CELL = Cell("vitrine", "small", "500x334", 32)


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    Store(tmp_path / "run.jsonl", fresh=False).add(Record(CELL, 1, 5.0, rate=10.0))
    again = Store(tmp_path / "run.jsonl", fresh=False)
    assert again.has(CELL, 1, 5.0)
    assert not again.has(CELL, 2, 5.0)
    assert not again.has(CELL, 1, 2.0)
    assert not Store(tmp_path / "run.jsonl", fresh=True).has(CELL, 1, 5.0)


def test_a_failure_is_measured_again_and_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.jsonl", fresh=False)
    store.add(Record(CELL, 1, 5.0, failure="it ended"))
    assert not store.has(CELL, 1, 5.0)
    store.add(Record(CELL, 1, 5.0, rate=10.0))
    assert [record.rate for record in store.of([CELL], 3, 5.0)] == [10.0]


def test_the_next_run_begins_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.jsonl", fresh=False)
    store.add(Record(CELL, 1, 5.0, rate=10.0))
    store.end()
    assert not Store(tmp_path / "run.jsonl", fresh=False).has(CELL, 1, 5.0)


def test_the_report_names_every_row_and_target(tmp_path: Path) -> None:
    records = [Record(cell, number, 5.0, rate=10.0, p50=5.0, cpu=0.01) for cell in headline() for number in (1, 2)]
    table, figures, picture = report.write([*records, Record(CELL, 3, 5.0, failure="it ended\nlog")], "headline", tmp_path)
    text = table.read_text()
    assert {cell.server for cell in headline()} == {
        cell.server for cell in headline() if f"| {cell.server} | 10.0 [10.0, 10.0]" in text
    }
    assert "**MISSED**" in text
    assert "- vitrine, small, 500x334, 32: it ended" in text
    assert figures.stat().st_size
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_headline_has_no_cell_twice() -> None:
    assert len(set(headline())) == len(headline())
