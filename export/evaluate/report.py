"""What a person, and a program, is told of an evaluation."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from export.evaluate.measuring import Measured

SHOWN = 40
"""Groups, and failures, that are printed; JSON has all."""

DECIMALS = 6
"""Of figures in JSON."""


def print_measured(measured: Measured, title: str, out: Console, err: Console) -> None:
    """The figures as tables on `out`, what failed and why on `err`."""
    out.print(_table(title, {f"{measured.count} {measured.unit}": measured.figures}, turned=True))
    if 0 < len(measured.groups) <= SHOWN:
        out.print(_table(measured.grouped_by, measured.groups))
    elif measured.groups:
        out.print(f"{len(measured.groups)} rows by {measured.grouped_by}; --json FILE has them.")
    for failure in measured.failures[:SHOWN]:
        err.print(f"{failure.name}: {failure.reason}", soft_wrap=True)
    if len(measured.failures) > SHOWN:
        err.print(f"... and {len(measured.failures) - SHOWN} more; --json FILE has them.")
    if measured.failures:
        counted = f"{len(measured.failures)} of {measured.count} {measured.unit} have no answer"
        err.print(f"{counted}; the figures count them as ones where nothing was found.", soft_wrap=True)


def as_json(measured: Measured, *, model: str, task: str, data: str) -> str:
    """The same as one JSON document; a figure that the data cannot tell is null."""
    document = {
        "model": model,
        "task": task,
        "data": data,
        measured.unit: measured.count,
        "figures": _rounded(measured.figures),
        "failed": [asdict(failure) for failure in measured.failures],
        **(
            {f"by_{measured.grouped_by}": {name: _rounded(row) for name, row in measured.groups.items()}} if measured.groups else {}
        ),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _rounded(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, DECIMALS) for name, value in figures.items()}


def _table(heading: str, rows: Mapping[str, Mapping[str, float | None]], *, turned: bool = False) -> Table:
    """A row for each name with its figures as columns, or `turned` around for the only name."""
    columns = [*rows] if turned else [*next(iter(rows.values()))]
    table = Table(heading, *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    if turned:
        (figures,) = rows.values()
        lines: list[tuple[Any, ...]] = [(name, _percent(value)) for name, value in figures.items()]
    else:
        lines = [(name, *map(_percent, row.values())) for name, row in rows.items()]
    for line in lines:
        table.add_row(*line)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
