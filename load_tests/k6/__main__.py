"""The command line: `python -m load_tests.k6 closed | open | search | sizes | faults`. Exit code 1 when a threshold is crossed."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from load_tests.cache import cache
from load_tests.images import PHOTOS, make_all
from load_tests.k6.goodput import Wanted, find
from load_tests.k6.runner import Distribution, K6Error, Plan, Run, run
from load_tests.k6.shots import SIZES, Form, Shot, faults, shot

IMAGES = cache() / "images"
PIPE_WIDTH = 160

app = typer.Typer(help="Load one server with k6.", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)

Url = Annotated[str, typer.Option(help="The route that takes the image.")]
Images = Annotated[Path, typer.Option(help="Where the images lie.", show_default="load_tests/.cache/images")]
Image = Annotated[str, typer.Option(help="The image that is sent.")]
BodyForm = Annotated[Form, typer.Option(help="How the image is sent.")]
Field = Annotated[str, typer.Option(help="Its name in a form or a JSON body.")]
Seconds = Annotated[float, typer.Option(min=1, help="How long each run lasts.")]
Limit = Annotated[float, typer.Option(min=0, help="Milliseconds; 99 % must be rightly answered within it.")]
Clients = Annotated[int, typer.Option(min=1)]
Stages = Annotated[bool, typer.Option(help="Read Server-Timing; it costs the client CPU.")]
Output = Annotated[Path | None, typer.Option(help="Write the results as JSON, to load_tests/results/NAME.json say.")]

DEFAULT = PHOTOS["500x334"].file
ROUTE = "http://127.0.0.1:8000/v1/classify"


@app.command()
def closed(
    *,
    url: Url = ROUTE,
    images: Images = IMAGES,
    image: Image = DEFAULT,
    form: BodyForm = "raw",
    field: Field = "image",
    clients: Annotated[str, typer.Option(help="A run for each.")] = "1,8,32",
    seconds: Seconds = 10,
    limit: Limit = 1000,
    stages: Stages = True,
    output: Output = None,
) -> None:
    """Closed loop: each client sends its next request when it has its answer."""
    try:
        counts = [int(count) for count in clients.split(",")]
    except ValueError:
        _fail(f"--clients is a comma list of numbers, not {clients!r}.")
    sent = [_shot(url, images, image, form, field)]
    plans = {f"{count} clients": Plan(sent, seconds, limit, clients=count, stages=stages) for count in counts}
    _report("closed", url, {name: _run(plan) for name, plan in plans.items()}, output)


@app.command(name="open")
def open_loop(
    *,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second.")],
    url: Url = ROUTE,
    images: Images = IMAGES,
    image: Image = DEFAULT,
    form: BodyForm = "raw",
    field: Field = "image",
    seconds: Seconds = 20,
    limit: Limit = 50,
    stages: Stages = True,
    output: Output = None,
) -> None:
    """Open loop: requests arrive as a Poisson process, answered or not."""
    plan = Plan([_shot(url, images, image, form, field)], seconds, limit, rate=rate, stages=stages)
    _report("open", url, {f"{rate:g}/s": _run(plan)}, output)


@app.command()
def search(
    *,
    url: Url = ROUTE,
    images: Images = IMAGES,
    image: Image = DEFAULT,
    form: BodyForm = "raw",
    field: Field = "image",
    seconds: Seconds = 20,
    limit: Limit = 50,
    start: Annotated[float, typer.Option(min=1, help="The first rate, requests a second.")] = 50,
    ceiling: Annotated[float, typer.Option(min=1, help="The highest rate tried.")] = 5000,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements at the final rates.")] = 3,
    max_steps: Annotated[int, typer.Option(min=1, help="Measurements at most.")] = 24,
    at_least: Annotated[float, typer.Option(min=0, help="Fail where the rate found is lower.")] = 0,
    output: Output = None,
) -> None:
    """Search for the highest rate of Poisson arrivals of which 99 % are rightly answered within the limit."""
    sent = [_shot(url, images, image, form, field)]
    wanted = Wanted(seconds, limit, start, ceiling, repeats, max_steps)

    def tell(rate: float, measured: Run) -> None:
        median = f", median {measured.latency.median:.1f} ms" if measured.latency else ""
        console.print(
            f"{rate:8.1f}/s: {measured.within:7.2%} within {limit:g} ms, {measured.dropped} never sent{median}; {_client(measured)}"
        )

    console.print(f"At most {max_steps} steps of {seconds:g} s, {wanted.minutes:.0f} minutes; usually two thirds of them.")
    try:
        found = find(sent, wanted, tell)
    except K6Error as error:
        _fail(str(error))
    console.print(str(found))
    _write(output, "search", url, found.as_json())
    if found.rate is None or found.rate < at_least or not found.search.settled:
        raise typer.Exit(1)


@app.command()
def sizes(
    *,
    url: Url = ROUTE,
    images: Images = IMAGES,
    form: BodyForm = "raw",
    field: Field = "image",
    clients: Clients = 8,
    seconds: Seconds = 20,
    limit: Limit = 5000,
    stages: Stages = True,
    output: Output = None,
) -> None:
    """Closed loop over images of every size in turn."""
    plan = Plan([_shot(url, images, name, form, field) for name in SIZES], seconds, limit, clients=clients, stages=stages)
    _report("sizes", url, {f"{clients} clients": _run(plan)}, output)


@app.command(name="faults")
def bad_input(
    *,
    url: Url = ROUTE,
    images: Images = IMAGES,
    image: Image = DEFAULT,
    clients: Clients = 8,
    seconds: Seconds = 10,
    limit: Limit = 1000,
    output: Output = None,
) -> None:
    """Closed loop over good and broken requests in turn, for a Vitrine gateway: each must get its own status and code."""
    good = _shot(url, images, image)
    broken = faults(url, images / image)
    sent = [either for fault in broken for either in (good, fault)]
    _report("faults", url, {f"{clients} clients": _run(Plan(sent, seconds, limit, clients=clients))}, output)


def _shot(url: str, images: Path, image: str, form: Form = "raw", field: str = "image") -> Shot:
    if images == IMAGES:
        make_all()
    if not (images / image).is_file():
        _fail(f"There is no {image} in {images}.")
    return shot(url, images / image, form, field)


def _run(plan: Plan) -> Run:
    try:
        return run(plan)
    except K6Error as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"k6: {message}", err=True)
    raise typer.Exit(2)


def _report(scenario: str, url: str, runs: Mapping[str, Run], output: Path | None) -> None:
    """Print the runs, write them where asked, and end with 1 when one of them failed."""
    _print_latencies(runs)
    _print_stages(runs)
    for name, measured in runs.items():
        console.print(f"{name}: {'passed' if measured.passed else 'FAILED'}; {_client(measured)}")
        for line in (*measured.crossed, *measured.log):
            console.print(f"  {line}")
    _write(output, scenario, url, {"runs": {name: asdict(measured) for name, measured in runs.items()}})
    if not all(measured.passed for measured in runs.values()):
        raise typer.Exit(1)


def _client(measured: Run) -> str:
    each = 1000 * measured.client_seconds / max(1, measured.requests)
    return f"the client used {measured.client_cores:.2f} cores, {each:.2f} ms per request"


def _print_latencies(runs: Mapping[str, Run]) -> None:
    table = Table("", "requests", "answers/s", "right", "in time", "never sent", "median ms", "p90", "p99", "max")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, measured in runs.items():
        shares = (f"{measured.rate:.1f}", f"{measured.expected:.2%}", f"{measured.within:.2%}", str(measured.dropped))
        table.add_row(name, str(measured.requests), *shares, *_cells(measured.latency), style="bold")
        if len(measured.shots) > 1:
            for kind, latency in measured.shots.items():
                table.add_row(f"  {kind}", str(latency.count), "", "", "", "", *_cells(latency))
    console.print(table)


def _print_stages(runs: Mapping[str, Run]) -> None:
    names = list(dict.fromkeys(stage for measured in runs.values() for stage in measured.stages))
    if not names:
        return
    table = Table("stage", *(f"{name}: median ms / p99" for name in runs))
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in names:
        found = (measured.stages.get(stage) for measured in runs.values())
        table.add_row(stage, *("-" if latency is None else f"{latency.median:.2f} / {latency.p99:.2f}" for latency in found))
    console.print(table)


def _cells(latency: Distribution | None) -> Sequence[str]:
    if latency is None:
        return ("-",) * 4
    return tuple(f"{value:.1f}" for value in (latency.median, latency.p90, latency.p99, latency.max))


def _write(output: Path | None, scenario: str, url: str, results: Mapping[str, Any]) -> None:
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    document = {"scenario": scenario, "url": url, "date": datetime.now(UTC).isoformat(timespec="seconds"), **results}
    output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    app(prog_name="python -m load_tests.k6")
