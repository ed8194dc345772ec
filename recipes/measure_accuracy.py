"""Measure a classifier's accuracy through the REST API on the validation images of a data archive.

    python recipes/measure_accuracy.py --data tiny_imagenet_50.npz --url http://127.0.0.1:8000 --model convnext-50

The archive is that of `convnext_50.py`. Its class names must be the model's labels. With `--record model_repository` the
figures are written into the manifest of the version that answered. For a folder of images, there is `python -m export eval`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from app.client import DEFAULT_URL, Client
from app.manifest import MANIFEST_FILE, Manifest
from export.evaluate.classification import Example, measure_classifier
from export.evaluate.measuring import Asking
from export.evaluate.naming import match
from export.evaluate.plans import Subject, find


def validation_images(path: Path) -> Iterator[Example]:
    """Every validation image with the name of its class."""
    archive = np.load(path)
    data, offsets = archive["data"], archive["offsets"]
    for index in np.flatnonzero(archive["is_val"]):
        photo = data[offsets[index] : offsets[index + 1]].tobytes()
        yield Example(f"image {index}", photo, str(archive["names"][archive["label"][index]]))


def measure(client: Client, subject: Subject, data: Path) -> dict[str, float]:
    """The number of images, and top-1 and top-5 accuracy in 0..1."""
    examples = list(validation_images(data))
    names = sorted({example.category for example in examples})
    meaning = match(names, subject.classes, {}, model=subject.name, data=data)
    measured = measure_classifier(client, examples, meaning, subject.classes.count, Asking(subject.name))
    assert not measured.failures, measured.failures
    return {"images": measured.count} | {name: round(value, 4) for name, value in measured.figures.items() if value is not None}


def record(version: Path, figures: dict[str, float]) -> None:
    """Write the figures into the version's manifest."""
    file = version / MANIFEST_FILE
    document = json.loads(file.read_text())
    document["verification"]["accuracy"] = figures
    beside = file.with_suffix(".tmp")
    beside.write_text(Manifest.model_validate(document).model_dump_json(indent=2) + "\n")
    beside.replace(file)  # a running gateway reads the old manifest or the new one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--model", default="convnext-50")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifest there")
    options = parser.parse_args()
    with Client(options.url) as client:
        subject = find(client, options.model)
        figures = measure(client, subject, options.data)
    print(f"{subject.name}: {json.dumps(figures)}")
    if options.record:
        record(options.record / subject.name.replace("@", "/"), figures)


if __name__ == "__main__":
    main()
