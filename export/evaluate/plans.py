"""What is to be done for a model of each task: find the model, read the data, match their names, ask for all of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from app.client import Client, ClientError
from app.manifest import Manifest
from export.evaluate import classification, coco, detection, grounding
from export.evaluate.measuring import Asking, EvaluationError, Measured, find_images, write
from export.evaluate.naming import Classes, Renaming, match


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
        known = ", ".join(model.id for model in client.models() if model.task in PLANS and model.phrases is None) or "none"
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
    if subject.manifest.text is not None:
        raise EvaluationError(f"{subject.name} looks for phrases and has no classes of its own; there is no measure for that.")
    detection.check_tools()
    if given.masks and (subject.manifest.detection is None or subject.manifest.detection.masks is None):
        raise EvaluationError(f"{subject.name} has no masks.")
    _needs_file(subject, given.data, "a JSON file in COCO's format")
    whole = coco.read_coco(given.data)
    meaning = _meaning([category.name for category in whole.categories], subject, given)
    data, folder = whole.restricted(meaning), given.images or given.data.parent
    categories = detection.categories_of(data, meaning)
    find_images([image.file_name for image in data.images], folder, given.data)
    if given.masks:
        coco.check_masks(data, given.data)

    def measure(client: Client, asking: Asking) -> Measured:
        found, failures = detection.detect(client, data, folder, categories, subject.classes, asking=asking, masks=given.masks)
        if given.results is not None:
            write(given.results, detection.results_json(found))
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
