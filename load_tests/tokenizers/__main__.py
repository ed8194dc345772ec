"""How fast tokenizers are served: `python -m load_tests.tokenizers --repository DIR MODEL...`.

For each model and way three engines: the gateway over HTTP with 8 clients, the floor (the same work in a loop in process, on all
cores) and torch (the forward pass alone, on all cores). The settings of the last two are the best of a search before the rounds.
Rounds are interleaved, each begins at another engine. A slow model takes its time, because a measurement has 48 answers at least.
Writes to `load_tests/results`. Nothing else may run on the machine meanwhile.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from app.manifest import ManifestError
from app.settings import available_cpus
from load_tests import images
from load_tests.cache import RESULTS, ROOT
from load_tests.processes import unwind_on_sigterm
from load_tests.tokenizers import inside, report, served
from load_tests.tokenizers.floor import Floor
from load_tests.tokenizers.inside import BATCHES, LAYOUTS, Job, Memory, Point
from load_tests.tokenizers.records import ENGINES, FLOOR, HTTP, TORCH, Peak, Record, verdicts
from load_tests.tokenizers.ways import HEADLINE, WAYS, Tokenizer, Way, find

T = TypeVar("T")
SEARCH = 0.5  # of a round's seconds


@dataclass(frozen=True)
class Setting:
    """How an engine is run in process, and how fast that was in the search."""

    processes: int
    threads: int
    point: Point
    rate: float

    def __str__(self) -> str:
        processes, threads = (
            f"{n} {noun}{end * (n > 1)}" for n, noun, end in ((self.processes, "process", "es"), (self.threads, "thread", "s"))
        )
        layout = f", {self.point.layout}" if self.point.layout else ""
        return f"{processes}, {threads}, batch {self.point.batch}{layout}"


def main(
    *,
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Tokenizers of the repository.")],
    repository: Annotated[Path, typer.Option(help="The model repository.", show_default="model_repository")] = ROOT
    / "model_repository",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of one measurement at least.")] = 5.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the gateway.")] = 1,
    output: Annotated[Path, typer.Option(help="Directory of the report.", show_default="load_tests/results")] = RESULTS,
) -> None:
    unwind_on_sigterm()
    images.make_all()
    try:
        subjects = [Subject(find(repository, name), seconds, workers) for name in names]
    except ManifestError as error:
        raise typer.BadParameter(f"{error}.", param_hint="MODEL") from error
    for subject in subjects:
        subject.search()
    turns = [(subject, engine) for subject in subjects for engine in ENGINES]
    records: list[Record] = []
    for number in range(1, rounds + 1):
        for subject, engine in in_turn(turns, number):
            for record in subject.measure(engine, number):
                print(f"round {number}: {record.model}, {record.way}, {engine}: {_figures(record)}", flush=True)
                records.append(record)
    peaks = [peak for subject in subjects for peak in subject.peaks()]
    options = f"--rounds {rounds} --seconds {seconds:g} --workers {workers}"
    for file in report.write(records, peaks, report.about([each.model for each in subjects], options), output):
        print(os.path.relpath(file))
    for verdict in verdicts(records):
        value = "not measured" if verdict.estimate is None else f"{verdict.estimate.value:.2f}"
        print(f"{verdict.work}: {verdict.goal}: {value} {'' if verdict.met is None else 'met' if verdict.met else 'MISSED'}")


class Subject:
    """One tokenizer, and how each of its engines is measured."""

    def __init__(self, model: Tokenizer, seconds: float, workers: int) -> None:
        self.model = model
        self.seconds = seconds
        self.workers = workers
        self.tokens = Floor(model, WAYS[:1], available_cpus(), b"").container()
        self.best: dict[str, dict[Way, Setting]] = {}
        self.failures: dict[str, str] = {}

    def search(self) -> None:
        """Find the fastest setting in process for every way, of the floor and of torch."""
        for engine in (FLOOR, TORCH):
            try:
                self.best[engine] = best(self._settings(engine))
            except Exception as error:  # whatever keeps torch from building the network, the other rows are measured
                self.failures[engine] = f"{type(error).__name__}: {error}"
            for way, setting in self.best.get(engine, {}).items():
                print(f"{self.model.name}, {way}, {engine}: {setting}, {setting.rate:.2f} images/s", flush=True)

    def measure(self, engine: str, number: int) -> Iterator[Record]:
        """A record of every way that the engine has, with a figure or with what kept it from one."""
        waiting = list(HEADLINE if engine == TORCH else WAYS)
        try:
            for record in self._over_http(number) if engine == HTTP else self._in_process(engine, number):
                waiting.remove(record.way)
                yield record
        except Exception as error:
            yield from (Record(self.model.name, way, engine, number, failure=str(error) or repr(error)) for way in waiting)

    def peaks(self) -> Iterator[Peak]:
        """Of every engine in each direction."""
        for way in HEADLINE:
            role = self.model.entry(way).manifest.role
            for engine in ENGINES:
                try:
                    found = self._peaks_over_http(way) if engine == HTTP else inside.peaks(self._job_of_one(engine, way))
                except Exception as error:
                    yield Peak(self.model.name, role, engine, failure=str(error) or repr(error))
                else:
                    yield Peak(self.model.name, role, engine, found.loaded, found.above[1], found.above[8])

    def _settings(self, engine: str) -> Iterator[Setting]:
        layouts = LAYOUTS if engine == TORCH else ("",)
        ways = HEADLINE if engine == TORCH else WAYS
        points = tuple(Point(way, size, layout) for layout in layouts for way in ways for size in BATCHES)
        for processes, threads in shapes(engine, available_cpus()):
            job = Job(engine, self.model, points, processes, threads, self.tokens)
            for point, speed in zip(points, inside.speeds(job, SEARCH * self.seconds), strict=True):
                yield Setting(processes, threads, point, speed.rate)

    def _over_http(self, number: int) -> Iterator[Record]:
        setting = f"{self.workers} process{'es' * (self.workers > 1)}"
        with served.serve(self.model, self.tokens, self.workers) as gateway:
            for way in WAYS:
                load, cpu = gateway.rate(way, self.seconds)
                yield Record(self.model.name, way, HTTP, number, load.rate, load.p50, load.p90, load.p99, cpu, setting)

    def _in_process(self, engine: str, number: int) -> Iterator[Record]:
        chosen = self._chosen(engine)
        for shape in dict.fromkeys((each.processes, each.threads) for each in chosen.values()):
            mine = {way: each for way, each in chosen.items() if (each.processes, each.threads) == shape}
            points = tuple(each.point for each in mine.values())
            job = Job(engine, self.model, points, *shape, self.tokens)
            for (way, setting), speed in zip(mine.items(), inside.speeds(job, self.seconds), strict=True):
                yield Record(self.model.name, way, engine, number, speed.rate, cpu=speed.cpu, setting=str(setting))

    def _peaks_over_http(self, way: Way) -> Memory:
        with served.serve(self.model, self.tokens, self.workers) as gateway:
            return gateway.peaks(way)

    def _chosen(self, engine: str) -> dict[Way, Setting]:
        """Raises:
        RuntimeError: the search found nothing that runs.
        """
        if engine in self.failures:
            raise RuntimeError(self.failures[engine])
        return self.best[engine]

    def _job_of_one(self, engine: str, way: Way) -> Job:
        """For memory: one process with all threads, in the best layout."""
        point = replace(self._chosen(engine)[way].point, batch=1)
        return Job(engine, self.model, (point,), 1, available_cpus(), self.tokens)


def shapes(engine: str, cores: int) -> list[tuple[int, int]]:
    """Processes and threads of each that fill all cores; torch's threads are its own."""
    return list(dict.fromkeys([(1, cores)] if engine == TORCH else [(cores, 1), (1, cores)]))


def best(settings: Iterator[Setting]) -> dict[Way, Setting]:
    """The fastest of each way."""
    found: dict[Way, Setting] = {}
    for each in settings:
        way = each.point.way
        if way not in found or each.rate > found[way].rate:
            found[way] = each
    return found


def in_turn(turns: Sequence[T], number: int) -> list[T]:
    """Each round begins one further on."""
    first = (number - 1) % len(turns)
    return [*turns[first:], *turns[:first]]


def _figures(record: Record) -> str:
    return record.failure or f"{record.rate:.2f} images/s, {1000 * record.cpu:.2f} ms of processor time ({record.setting})"


if __name__ == "__main__":
    typer.run(main)
