"""Measure a classifier's accuracy through the REST API on the validation images of a data archive.

    python recipes/measure_accuracy.py --data tiny_imagenet_50.npz --url http://127.0.0.1:8000 --model convnext-50

The archive is that of `convnext_50.py`. Its class names must be the model's labels. With `--record model_repository` the
figures are written into the manifest of the version that answered.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from app.client import DEFAULT_URL, Client
from app.manifest import MANIFEST_FILE, Manifest

BATCH = 25


def validation_images(path: Path) -> Iterator[tuple[bytes, str]]:
    """Encoded image and class name of every validation image."""
    archive = np.load(path)
    data, offsets = archive["data"], archive["offsets"]
    for index in np.flatnonzero(archive["is_val"]):
        yield data[offsets[index] : offsets[index + 1]].tobytes(), str(archive["names"][archive["label"][index]])


def measure(client: Client, examples: list[tuple[bytes, str]], model: str | None) -> tuple[dict[str, float], str, int]:
    """Top-1 and top-5 accuracy in 0..1, and the model and version that answered."""
    top1 = top5 = 0
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        answer = client.classify([image for image, _ in batch], model=model, top_k=5)
        for item, (_, name) in zip(answer.results, batch, strict=True):
            labels = [prediction.label for prediction in item.predictions or ()]
            top1 += labels[:1] == [name]
            top5 += name in labels
    figures = {"images": len(examples), "top1": round(top1 / len(examples), 4), "top5": round(top5 / len(examples), 4)}
    return figures, answer.model, answer.version


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
    parser.add_argument("--model")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifest there")
    options = parser.parse_args()
    with Client(options.url) as client:
        figures, model, version = measure(client, list(validation_images(options.data)), options.model)
    print(f"{model}@{version}: {json.dumps(figures)}")
    if options.record:
        record(options.record / model / str(version), figures)


if __name__ == "__main__":
    main()
