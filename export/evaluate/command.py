"""`python -m export eval MODEL --data ...`: find the model, read the data, match their names, ask, tell."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from app.cli import PIPE_WIDTH, progress
from app.client import Client, ClientError
from app.local_gateway import LocalGatewayError, local_gateway
from app.manifest import Manifest
from app.settings import Settings
from export.evaluate import classification, detection, grounding
from export.evaluate.measuring import REQUESTS, Asking, EvaluationError, Measured, find_images
from export.evaluate.naming import Classes, Renaming, match, read_renaming
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
            _write(json_file, as_json(measured, model=subject.name, task=subject.task, data=str(data)))
    except (EvaluationError, LocalGatewayError, ClientError) as error:
        err.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error
    print_measured(measured, subject.name, out, err)
    if measured.failures:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Subject:
    """The model that is measured: `name` is NAME@VERSION."""

    name: str
    task: str
    manifest: Manifest

    @property
    def classes(self) -> Classes:
        detection = self.manifest.detection
        return Classes(self.manifest.outputs[0].shape[1] if detection is None else detection.classes, self.manifest.labels)


@dataclass(frozen=True)
class Given:
    """What the command line says of the data, and of what is wanted of a detector: a file of `results`, and `masks`."""

    data: Path
    images: Path | None = None
    renaming: Renaming = field(default_factory=dict)
    results: Path | None = None
    masks: bool = False


@dataclass(frozen=True)
class Work:
    """How many items will be asked for, and what does it."""

    count: int
    measure: Callable[[Client, Asking], Measured]


@contextmanager
def served(url: str | None, repository: Path | None) -> Iterator[Client]:
    """A client of the gateway at `url`, or of one on `repository` that lives as long as this block.

    Raises:
        EvaluationError: the environment's settings of the gateway cannot be used.
        LocalGatewayError: it does not start.
    """
    if url is not None:
        with Client(url, TIMEOUT) as client:
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


def find(client: Client, name: str) -> Subject:
    """The model with its version, so that all answers are of one.

    Raises:
        EvaluationError: there is none of that name, it cannot serve, or there is no measure for its task.
        ClientError: no answer came.
    """
    try:
        found = client.model(name)
    except ClientError as error:
        if error.status != 404:
            raise
        known = ", ".join(model.id for model in client.models() if model.task in PLANS) or "none"
        raise EvaluationError(f"There is no model {name}; models to evaluate are: {known}.") from error
    version = name.partition("@")[2] or found.version
    if found.manifest is None or version is None:
        raise EvaluationError(f"{name} cannot serve: {'; '.join(found.problems)}.")
    if found.task not in PLANS:
        raise EvaluationError(f"{name} is a model for {found.task}; there are measures for {', '.join(PLANS)}.")
    try:
        manifest = Manifest.model_validate(found.manifest)
    except ValidationError as error:
        raise EvaluationError(f"The gateway at {client.url} is of another version: it describes models otherwise.") from error
    return Subject(f"{found.id}@{version}", found.task, manifest)


def _classifier(subject: Subject, given: Given) -> Work:
    _is_no_detector(subject, given)
    if given.images is not None:
        raise EvaluationError(f"{subject.name} is a classifier: --data is the folder with its images, and --images says nothing.")
    examples = classification.read_folder(given.data)
    meaning = _meaning([*dict.fromkeys(example.category for example in examples)], subject, given)
    wanted = [example for example in examples if example.category in meaning]

    def measure(client: Client, asking: Asking) -> Measured:
        return classification.measure_classifier(client, wanted, meaning, subject.classes.count, asking)

    return Work(len(wanted), measure)


def _detector(subject: Subject, given: Given) -> Work:
    detection.check_tools()
    if given.masks and (subject.manifest.detection is None or subject.manifest.detection.masks is None):
        raise EvaluationError(f"{subject.name} has no masks.")
    _needs_file(subject, given.data, "a JSON file in COCO's format")
    whole = detection.read_coco(given.data)
    meaning = _meaning([category.name for category in whole.categories], subject, given)
    data, folder = whole.restricted(meaning), given.images or given.data.parent
    categories = detection.categories_of(data, meaning)
    find_images([image.file_name for image in data.images], folder, given.data)
    if given.masks:
        detection.check_masks(data, given.data)

    def measure(client: Client, asking: Asking) -> Measured:
        found, failures = detection.detect(client, data, folder, categories, subject.classes, asking=asking, masks=given.masks)
        if given.results is not None:
            _write(given.results, detection.results_json(found))
        return detection.measure_detector(data, found, failures, masks=given.masks)

    return Work(len(data.images), measure)


def _grounder(subject: Subject, given: Given) -> Work:
    _is_no_detector(subject, given)
    if given.renaming:
        raise EvaluationError(f"{subject.name} has no classes, so --map says nothing.")
    _needs_file(subject, given.data, "JSON, or JSON lines, of images, phrases and boxes")
    examples, folder = grounding.read_phrases(given.data), given.images or given.data.parent
    find_images([example.image for example in examples], folder, given.data)
    return Work(len(examples), lambda client, asking: grounding.measure_grounder(client, examples, folder, asking))


PLANS: dict[str, Callable[[Subject, Given], Work]] = {"classify": _classifier, "detect": _detector, "ground": _grounder}
"""What is to be done for a model of each task."""


def _meaning(names: list[str], subject: Subject, given: Given) -> dict[str, frozenset[int]]:
    return match(names, subject.classes, given.renaming, model=subject.name, data=given.data)


def _needs_file(subject: Subject, data: Path, what: str) -> None:
    if not data.is_file():
        raise EvaluationError(f"{subject.name} is a model for {subject.task}: --data is {what}, and {data} is a folder.")


def _is_no_detector(subject: Subject, given: Given) -> None:
    for flag in (["--results"] if given.results is not None else []) + (["--masks"] if given.masks else []):
        raise EvaluationError(f"{flag} is for detectors, and {subject.name} is a model for {subject.task}.")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise EvaluationError(f"{file} cannot be written: {error.strerror}.") from error


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(epilog=_EPILOG, no_args_is_help=True)(main)
