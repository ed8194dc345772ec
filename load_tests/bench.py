"""Vitrine and the servers that people would otherwise use, on the same model file and the same photo, in turn.

`python -m load_tests.bench` measures the headline rows in less than fifteen minutes, `--full` every combination in some hours;
`--dry-run` says what it would do, and how long. A round starts each server alone, measures its cells and ends it; the next round
begins with another server. What is finished is kept: a run that was interrupted goes on where it was. Needs wrk.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from app import local_triton
from load_tests import floor, images, models, plan, report
from load_tests.cache import ROOT, cache
from load_tests.cells import FLOOR, TRITON, Cell, Record, full, headline
from load_tests.images import PHOTOS
from load_tests.models import MODELS, repository
from load_tests.plan import WARM_UP, Start, duration
from load_tests.processes import ServerError, unwind_on_sigterm
from load_tests.servers import CONTENDERS, Contender, predictions
from load_tests.servers import start as make_server
from load_tests.wrk import WrkError, body, run

FAILURES = (ServerError, WrkError, KeyError, ValueError, OSError, subprocess.SubprocessError, local_triton.LocalTritonError)


def main(
    *,
    all_cells: Annotated[bool, typer.Option("--full", help="Every model, photo and number of clients.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Of one cell; twice that for the 12 MP photo.")] = 3.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and end.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted run has measured.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory of the report.", show_default="load_tests/results")] = None,
) -> None:
    cells = full() if all_cells else headline()
    starts = plan.starts(cells)
    wanted = plan.minutes(cells, rounds, seconds)
    if dry_run:
        for start, members in starts.items():
            print(f"{plan.expected(start, members, seconds):5.1f} s  {'; '.join(map(_name, members))}")
    print(f"{rounds} rounds of {len(starts)} starts and {len(cells)} cells, about {wanted:.1f} minutes.", flush=True)
    if dry_run:
        return
    unwind_on_sigterm()
    images.make_all()
    models.make_all()
    began = time.monotonic()
    store = Store(cache() / ("bench-full.jsonl" if all_cells else "bench.jsonl"), fresh)
    for number in range(1, rounds + 1):
        for start, members in plan.in_turn(starts, number):
            missing = [cell for cell in members if not store.has(cell, number, seconds)]
            if missing:
                _measure(start, missing, number, seconds, store)
    print(
        f"{(time.monotonic() - began) / 60:.1f} minutes; {wanted:.1f} were expected of a run that was not interrupted.", flush=True
    )
    records = store.of(cells, rounds, seconds)
    for file in report.write(records, "full" if all_cells else "headline", output):
        print(file)
    failed = [record for record in records if record.failure]
    for record in failed:
        print(f"no figure: {_name(record.cell)}, round {record.round}: {record.failure.splitlines()[0]}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)
    store.end()


class Store:
    """The finished cells of a run, a line of JSON each; failures are kept too, and measured again when the run goes on."""

    def __init__(self, file: Path, fresh: bool) -> None:
        self.file = file
        if fresh:
            file.unlink(missing_ok=True)
        lines = file.read_text().splitlines() if file.is_file() else []
        self.records = [Record.from_json(json.loads(line)) for line in lines]

    def has(self, cell: Cell, number: int, seconds: float) -> bool:
        return any((each.cell, each.round, each.seconds) == (cell, number, seconds) and not each.failure for each in self.records)

    def add(self, record: Record) -> None:
        self.records.append(record)
        with self.file.open("a") as file:
            file.write(json.dumps(record.as_json()) + "\n")

    def of(self, cells: Sequence[Cell], rounds: int, seconds: float) -> list[Record]:
        """The last record of every cell and round."""
        last = {(each.cell, each.round): each for each in self.records if each.seconds == seconds and each.round <= rounds}
        return [last[cell, number] for cell in cells for number in range(1, rounds + 1) if (cell, number) in last]

    def end(self) -> None:
        """The run is complete and reported; the next one begins anew."""
        self.file.replace(self.file.with_suffix(".done.jsonl"))


def _measure(start: Start, cells: Sequence[Cell], number: int, seconds: float, store: Store) -> None:
    waiting = list(cells)
    try:
        for record in _records(start, cells, number, seconds):
            waiting.remove(record.cell)
            store.add(record)
            print(f"round {number}: {_name(record.cell)}: {_figures(record)}", flush=True)
    except FAILURES as error:
        for cell in waiting:
            store.add(Record(cell, number, seconds, failure=f"{type(error).__name__}: {error}"))
        print(f"round {number}: {_name(waiting[0])}: NO FIGURE: {str(error)[:2000]}", flush=True)


def _records(start: Start, cells: Sequence[Cell], number: int, seconds: float) -> Iterator[Record]:
    if start.kind == FLOOR:
        yield from _floor(cells, number, seconds)
    elif start.kind == TRITON:
        with _triton() as url:
            more = {"VITRINE_BACKEND": "triton", "VITRINE_TRITON_URL": url}
            for cell in cells:
                if cell.server == TRITON:
                    yield _bare_triton(cell, number, seconds, url)
                else:
                    yield from _served(Start("vitrine", cell.model), [cell], number, seconds, **more)
    else:
        yield from _served(start, cells, number, seconds)


def _served(start: Start, cells: Sequence[Cell], number: int, seconds: float, **more: str) -> Iterator[Record]:
    contender, tuning = _contender(cells[0]), start.tuning
    server, url = make_server(contender, tuning, MODELS[start.model], **more)
    setting = f"{tuning.workers} worker{'s' * (tuning.workers > 1)}" if contender.kind == "vitrine" else str(tuning)
    with server:
        for cell in cells:
            form, field = _contender(cell).ask(tuning)
            sent = body(PHOTOS[cell.photo], form, field)
            answer = predictions(contender.kind, server.wait(url, sent))
            if len(answer) != 5:
                raise ValueError(f"{len(answer)} predictions instead of 5")
            if cell is cells[0]:
                run(url, sent, cell.clients, WARM_UP, cache() / "wrk")
            server.settle()
            before = server.usage()
            load = run(url, sent, cell.clients, duration(cell, seconds), cache() / "wrk")
            after = server.usage()
            if load.errors or not load.requests:
                raise ValueError(f"{load.errors} of {load.requests} requests failed")
            yield Record(
                cell, number, seconds, load.rate, load.p50, load.p90, load.p99, load.errors,
                cpu=(after.cpu - before.cpu) / load.requests, memory=after.memory, setting=setting,
            )  # fmt: skip


def _contender(cell: Cell) -> Contender:
    """The gateway before Triton is asked as the gateway is."""
    return CONTENDERS.get(cell.server, CONTENDERS["vitrine"])


def _floor(cells: Sequence[Cell], number: int, seconds: float) -> Iterator[Record]:
    photos = [(PHOTOS[cell.photo], duration(cell, seconds) / 2) for cell in cells]
    for cell, found in zip(cells, floor.measure(MODELS[cells[0].model], photos), strict=True):
        yield Record(cell, number, seconds, found.rate, cpu=found.cpu, setting=f"batch {found.batch}")


def _bare_triton(cell: Cell, number: int, seconds: float, url: str) -> Record:
    model = MODELS[cell.model]
    command = [sys.executable, str(ROOT / "load_tests/peers/triton/client.py"), url, model.name, str(PHOTOS[cell.photo].path)]
    settings = {"PYTHONPATH": str(ROOT), "BENCH_MODEL": str(model.onnx), "BENCH_MANIFEST": str(model.manifest)}
    done = subprocess.run(  # noqa: S603
        [*command, "--clients", str(cell.clients), "--seconds", str(seconds)],
        env={**os.environ, **settings, "BENCH_DECODE": "vitrine"}, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout)
    rate = found["requests"] / seconds
    return Record(cell, number, seconds, rate, found["p50"], found["p90"], found["p99"], prepare=found["prepare"])


@contextmanager
def _triton() -> Iterator[str]:
    """The gRPC address of the local Triton, which serves the models of the comparison."""
    home = local_triton.find(ROOT / local_triton.HOME)
    with TemporaryFile() as log, local_triton.LocalTriton(repository(), local_triton.free_ports(), home, log) as triton:
        yield triton.url


def _name(cell: Cell) -> str:
    return f"{cell.server}, {cell.model}, {cell.photo}, {cell.clients} client{'s' * (cell.clients > 1)}"


def _figures(record: Record) -> str:
    setting = f" ({record.setting})" if record.setting else ""
    return f"{record.rate:.1f} images/s, p50 {record.p50:.2f} ms, {1000 * record.cpu:.2f} ms of processor time{setting}"


if __name__ == "__main__":
    typer.run(main)
