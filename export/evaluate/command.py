"""`python -m export eval MODEL --data ...`: what is asked of which gateway; what is done about it is in `plans.py`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from app.cli import PIPE_WIDTH, progress
from app.client import Client, ClientError
from app.local_gateway import LocalGatewayError, local_gateway
from app.settings import Settings
from export.evaluate.measuring import REQUESTS, Asking, EvaluationError, write
from export.evaluate.naming import read_renaming
from export.evaluate.plans import PLANS, Given, find
from export.evaluate.report import as_json, print_measured

TIMEOUT = 600.0
"""Seconds for one answer, the loading of a large engine included."""

_EPILOG = "Exit codes: 0 measured, 1 something has no answer or cannot be evaluated, 2 wrong usage or a library is missing."
_DATA = "COCO's JSON for a detector, a folder with a sub-folder per class for a classifier, JSON of phrases for grounding."


def main(
    model: Annotated[str, typer.Argument(help="NAME or NAME@VERSION of a published model.", metavar="MODEL", show_default=False)],
    *,
    data: Annotated[Path, typer.Option(exists=True, help=_DATA, show_default=False)],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images of a JSON file lie.", show_default="its own folder")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The gateway to ask.", show_default="one in this process")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="What the gateway in this process serves.", show_default="model_repository")
    ] = None,
    renaming: Annotated[
        Path | None,
        typer.Option(
            "--map", exists=True, dir_okay=False, help='JSON: {"name in the data": "label of the model"}, null to leave out.'
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=64, help="Requests in flight.")] = REQUESTS,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there, too.")] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what a detector found there, as COCO's results.")
    ] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Measure the masks of a detector, too.")] = False,
) -> None:
    """Measure a published model on your own data, through the gateway that serves it."""
    out = Console(file=sys.stdout, markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    err = Console(file=sys.stderr, markup=False, emoji=False, highlight=False, stderr=True)
    if url is not None and repository is not None:
        raise typer.BadParameter("--repository is for the gateway in this process; with --url there is none.")
    for file in (json_file, results):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"There is no folder {file.parent} to write {file.name} to.")
    try:
        renamed = {} if renaming is None else read_renaming(renaming)
        with served(url, repository) as client:
            subject = find(client, model)
            work = PLANS[subject.task](subject, Given(data, images, renamed, results, masks))
            with progress(work.count) as advance:
                measured = work.measure(client, Asking(subject.name, requests, advance))
        if json_file is not None:
            write(json_file, as_json(measured, model=subject.name, task=subject.task, data=str(data)))
    except (EvaluationError, LocalGatewayError, ClientError) as error:
        err.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error
    print_measured(measured, subject.name, out, err)
    if measured.failures:
        raise typer.Exit(1)


@contextmanager
def served(url: str | None, repository: Path | None) -> Iterator[Client]:
    """A client of the gateway at `url`, which is sent the key of `VITRINE_API_KEY`, or of one on `repository` for this block alone.

    Raises:
        EvaluationError: the environment's settings of the gateway cannot be used.
        LocalGatewayError: it does not start.
    """
    if url is not None:
        with Client(url, TIMEOUT, os.environ.get("VITRINE_API_KEY")) as client:
            yield client
        return
    given: dict[str, Any] = {"preload": False, "repository_poll": 0, "request_timeout": TIMEOUT}
    try:
        settings = Settings(**given | ({} if repository is None else {"repository": repository}))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])).lower()}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise EvaluationError(f"Settings that cannot be used: {'; '.join(faults)}.") from error
    with local_gateway(settings) as address, Client(address, TIMEOUT) as client:
        yield client


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(epilog=_EPILOG, no_args_is_help=True)(main)
