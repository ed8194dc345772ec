"""Measure the zero-shot accuracy of a dual encoder on held-out scenes through the REST API.

    python recipes/measure_encoder.py --url http://127.0.0.1:8000 --model scenes-encoder --record model_repository

Of 50 scenes at a time, each picture is classified among the descriptions of all 50, and is right where its own scores highest.
A scene whose description its draw already has is left out. With `--record` the figures are written into the manifests of the
version that answered.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from measure_accuracy import record
from rate_distortion import encode_png
from scene_words import AMONG, DESCRIPTIONS, draws
from scenes import SPLITS, Picture, draw

from app.client import DEFAULT_URL, Classification, Client

BATCH = 10
ROLES = ("image", "text")


def measure(client: Client, model: str, pictures: Sequence[Picture]) -> tuple[Classification, dict[str, float]]:
    """An answer, and the share of pictures whose own description scores highest, by the form of the descriptions."""
    figures: dict[str, float] = {"zero_shot_among": AMONG}
    files = [encode_png(picture.pixels) for picture in pictures]
    for name, form in DESCRIPTIONS.items():
        texts = [form(picture.scene) for picture in pictures]
        hits: list[bool] = []
        for rows in draws(texts):
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                answer = client.classify([files[i] for i in some], model=model, labels=[texts[i] for i in rows], top_k=1)
                for row, item in zip(some, answer.results, strict=True):
                    assert item.predictions is not None, item.error
                    hits.append(item.predictions[0].label == texts[row])
        figures[f"zero_shot_{name}"] = round(sum(hits) / len(hits), 4)
        figures[f"images_{name}"] = len(hits)
    return answer, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=1000, help="of the held-out split")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--model", default="scenes-encoder")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifests there")
    options = parser.parse_args()
    pictures = [draw(number) for number in SPLITS["held-out"][: options.scenes]]
    with Client(options.url) as client:
        answer, figures = measure(client, options.model, pictures)
    print(f"{answer.model}@{answer.version}: {json.dumps(figures)}")
    for role in ROLES if options.record else ():
        record(options.record / f"{answer.model}.{role}" / str(answer.version), figures)


if __name__ == "__main__":
    main()
