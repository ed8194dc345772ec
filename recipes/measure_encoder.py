"""Measure the zero-shot accuracy of a dual encoder on held-out scenes through the REST API.

    python recipes/measure_encoder.py --url http://127.0.0.1:8000 --model scenes-encoder --record model_repository

Of 50 scenes at a time, each picture is classified among the descriptions of all 50, and is right where its own scores highest.
A scene whose description its draw already has is left out. With `--record` the figures are written into the manifests of the
version that answered.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from measure_accuracy import record
from PIL import Image
from rate_distortion import encode_png
from scene_words import AMONG, DESCRIPTIONS, draws
from scenes import SPLITS, Picture, draw

from app.client import DEFAULT_URL, Client

BATCH = 10
ROLES = ("image", "text")

Classify = Callable[[Sequence[Picture], Sequence[str]], list[str]]


def classifying(client: Client, model: str) -> Classify:
    """The best of the labels for each picture."""

    def classify(pictures: Sequence[Picture], labels: Sequence[str]) -> list[str]:
        files = [encode_png(Image.fromarray(picture.pixels)) for picture in pictures]
        found = []
        for item in client.classify(files, model=model, labels=labels, top_k=1).results:
            assert item.predictions is not None, item.error
            found.append(item.predictions[0].label)
        return found

    return classify


def measure(classify: Classify, pictures: Sequence[Picture]) -> dict[str, float]:
    """How many pictures there were and for which share their own description scores highest, by the form of the descriptions."""
    figures: dict[str, float] = {"zero_shot_among": AMONG}
    for name, form in DESCRIPTIONS.items():
        texts = [form(picture.scene) for picture in pictures]
        hits: list[bool] = []
        for rows in draws(texts):
            labels = [texts[row] for row in rows]
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                found = classify([pictures[row] for row in some], labels)
                hits += [label == texts[row] for label, row in zip(found, some, strict=True)]
        figures |= {f"images_{name}": len(hits), f"zero_shot_{name}": round(sum(hits) / len(hits), 4)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=1000, help="of the held-out split")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--model", default="scenes-encoder")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifests there")
    options = parser.parse_args()
    pictures = [draw(number) for number in SPLITS["held-out"][: options.scenes]]
    with Client(options.url) as client:
        found = client.model(options.model)
        figures = measure(classifying(client, f"{found.id}@{found.version}"), pictures)
    print(f"{found.id}@{found.version}: {json.dumps(figures)}")
    for role in ROLES if options.record else ():
        record(options.record / f"{found.id}.{role}" / str(found.version), figures)


if __name__ == "__main__":
    main()
