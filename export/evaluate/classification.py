"""Top-1 and top-5 accuracy of a classifier on a folder with one sub-folder of images per class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from app.cli import PHOTO_SUFFIXES
from app.client import Classification, Client, Photo
from export.evaluate.measuring import Asking, EvaluationError, Failure, Measured, share

MOST = 5


@dataclass(frozen=True)
class Example:
    """An image, by path or as encoded bytes, and the name of what it shows."""

    name: str
    photo: Photo
    category: str


def read_folder(folder: Path) -> list[Example]:
    """The images at any depth of each sub-folder; files of other kinds, and what lies beside the sub-folders, are passed over.

    Raises:
        EvaluationError: it is no folder, has no sub-folders, or one without an image.
    """
    if not folder.is_dir():
        raise EvaluationError(f"A classifier is evaluated on a folder with a sub-folder of images per class; {folder} is none.")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise EvaluationError(
            f"{folder} has no sub-folders; the images of each class belong into one that is named like its label."
        )
    examples = []
    for path in classes:
        images = sorted(file for file in path.rglob("*") if file.suffix.lower() in PHOTO_SUFFIXES)
        if not images:
            raise EvaluationError(f"There is no image in {path}; remove the sub-folder, or put the images of its class there.")
        examples += [Example(str(image.relative_to(folder)), image, path.name) for image in images]
    return examples


def measure_classifier(
    client: Client, examples: Sequence[Example], meaning: Mapping[str, frozenset[int]], classes: int, asking: Asking
) -> Measured:
    """The accuracies, over all and by category. An answer is right when it is one of the ids that the category means.

    Args:
        examples: at least one; those whose category has no meaning are left out.
        meaning: class ids by category.
        classes: how many the model knows; `top5` is measured where there are more than five.

    Raises:
        ClientError: something that does not concern one image alone.
    """
    top = min(MOST, classes)

    def ask(example: Example) -> Classification:
        return client.classify(example.photo, model=asking.model, top_k=top)

    failures: list[Failure] = []
    ranks: dict[str, list[int]] = {category: [] for category in meaning}
    wanted = [example for example in examples if example.category in meaning]
    for example, answer in asking.each(ask, wanted, lambda one: one.name, failures):
        given = (answer.results[0].predictions or ()) if answer else ()
        right = [rank for rank, prediction in enumerate(given) if prediction.class_id in meaning[example.category]]
        ranks[example.category].append(right[0] if right else classes)
    groups = {category: _figures(found, classes) for category, found in ranks.items()}
    return Measured("images", len(wanted), _figures([*chain.from_iterable(ranks.values())], classes), failures, "class", groups)


def _figures(ranks: Sequence[int], classes: int) -> dict[str, float | None]:
    """Of the ranks, counted from 0, that the right answers have."""
    figures = {"top1": share([rank == 0 for rank in ranks])}
    return figures | ({"top5": share([rank < MOST for rank in ranks])} if classes > MOST else {})
