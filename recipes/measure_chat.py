"""Measure a chat model on held-out scenes through the REST API: answers by the `openai` client, boxes by `/v1/ground`.

    python recipes/measure_chat.py --url http://127.0.0.1:8000 --model scenes-chat --record model_repository

An answer is right where it is the only right one, letter by letter; a description where it names every shape from left to right;
a box where it overlaps the right one by a half at least. With `--record` the figures are written into the manifests of the
version that answered.
"""

import argparse
import base64
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from measure_accuracy import record
from openai import OpenAI
from rate_distortion import encode_png
from scene_words import DESCRIPTION_QUESTIONS, describe, held_out_phrases, held_out_questions
from scenes import SPLITS, Picture, draw

from app.ahead import ahead
from app.client import DEFAULT_URL, Client
from export.evaluate.grounding import ENOUGH, overlap
from export.evaluate.measuring import share

REQUESTS = 4
MOST_TOKENS = 128
ROLES = ("vision", "embed", "decoder")

Ask = Callable[[tuple[Picture, str]], str]


def asking(client: OpenAI, model: str) -> Ask:
    """What the model answers to a question about a picture, greedily."""

    def ask(item: tuple[Picture, str]) -> str:
        picture, question = item
        url = f"data:image/png;base64,{base64.b64encode(encode_png(picture.pixels)).decode()}"
        answer = client.chat.completions.create(
            model=model,
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
                }
            ],
            temperature=0,
            max_tokens=MOST_TOKENS,
        )
        return answer.choices[0].message.content or ""

    return ask


def measure_answers(ask: Ask, pictures: Sequence[Picture], questions: int, descriptions: int) -> dict[str, float]:
    """How many questions there were and the share of them that is answered exactly, in all and by kind; the same of descriptions."""
    asked = held_out_questions([picture.scene for picture in pictures], questions)
    right: dict[str, list[bool]] = defaultdict(list)
    items = [(pictures[index], question.text) for index, question in asked]
    for (_, question), (_, answer) in zip(asked, ahead(ask, items, REQUESTS), strict=True):
        right[question.kind].append(answer.result() == question.answer)
    described = [
        answer.result() == describe(picture.scene)
        for (picture, _), answer in ahead(ask, [(each, DESCRIPTION_QUESTIONS[0]) for each in pictures[:descriptions]], REQUESTS)
    ]
    figures: dict[str, float] = {"questions": len(asked), "exact_match": _share([hit for hits in right.values() for hit in hits])}
    figures |= {f"exact_match_{kind.replace(' ', '_')}": _share(hits) for kind, hits in right.items()}
    return figures | {"descriptions": len(described), "described_exactly": _share(described)}


def measure_boxes(client: Client, model: str, pictures: Sequence[Picture], phrases: int) -> tuple[int, dict[str, float]]:
    """The version that answered; how many phrases there were, accuracy at IoU 0.5 and the mean overlap."""
    located = held_out_phrases([picture.scene for picture in pictures], phrases)
    found: list[float] = []
    for index, phrase in located:
        picture = pictures[index]
        answer = client.ground(encode_png(picture.pixels), phrase.text, model=model)
        (item,) = answer.results
        assert item.groundings is not None, item.error
        box = item.groundings[0].box
        found.append(0.0 if box is None else overlap(box, picture.scene.shapes[phrase.target].box))
    hits = _share([value >= ENOUGH for value in found])
    return answer.version, {"phrases": len(found), "box_accuracy": hits, "mean_iou": round(sum(found) / len(found), 4)}


def _share(hits: Sequence[bool]) -> float:
    return round(share(hits) or 0.0, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--phrases", type=int, default=500)
    parser.add_argument("--descriptions", type=int, default=200)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--model", default="scenes-chat")
    parser.add_argument("--record", type=Path, metavar="REPOSITORY", help="write the figures into the manifests there")
    options = parser.parse_args()
    most = max(options.questions, options.phrases, options.descriptions)
    pictures = [draw(number) for number in SPLITS["held-out"][: 2 * most]]  # not every scene can be asked every kind of question
    ask = asking(OpenAI(base_url=f"{options.url}/v1", api_key="none", max_retries=0), options.model)
    figures = measure_answers(ask, pictures, options.questions, options.descriptions)
    with Client(options.url) as client:
        version, boxes = measure_boxes(client, options.model, pictures, options.phrases)
    figures |= boxes
    name = options.model.partition("@")[0]
    print(f"{name}@{version}: {json.dumps(figures)}")
    for role in ROLES if options.record else ():
        record(options.record / f"{name}.{role}" / str(version), figures)


if __name__ == "__main__":
    main()
