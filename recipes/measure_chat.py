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
from PIL import Image
from rate_distortion import encode_png
from scene_words import DESCRIPTION_QUESTIONS, describe, held_out_phrases, held_out_questions
from scenes import SPLITS, Picture, draw

from app.ahead import ahead
from app.client import DEFAULT_URL, Box, Client
from export.evaluate.grounding import ENOUGH, overlap

REQUESTS = 4
MOST_TOKENS = 128
ROLES = ("vision", "embed", "decoder")

Asked = tuple[Picture, str]


def answering(client: OpenAI, model: str) -> Callable[[Asked], str]:
    """What the model says, greedily, to a question about a picture."""

    def answer(asked: Asked) -> str:
        picture, question = asked
        url = f"data:image/png;base64,{base64.b64encode(encode_png(Image.fromarray(picture.pixels))).decode()}"
        completion = client.chat.completions.create(
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
        return completion.choices[0].message.content or ""

    return answer


def locating(client: Client, model: str) -> Callable[[Asked], Box | None]:
    """The box that the model names for a phrase about a picture."""

    def locate(asked: Asked) -> Box | None:
        picture, phrase = asked
        (item,) = client.ground(encode_png(Image.fromarray(picture.pixels)), phrase, model=model).results
        assert item.groundings is not None, item.error
        return item.groundings[0].box

    return locate


def measure_answers(answer: Callable[[Asked], str], pictures: Sequence[Picture], most: int) -> dict[str, float]:
    """How many questions there were, `most` at most, and the share that is answered exactly, in all and by kind."""
    questions = held_out_questions([picture.scene for picture in pictures], most)
    right: dict[str, list[bool]] = defaultdict(list)
    asked = [(pictures[index], question.text) for index, question in questions]
    for (_, question), (_, said) in zip(questions, ahead(answer, asked, REQUESTS), strict=True):
        right[question.kind].append(said.result() == question.answer)
    figures = {"questions": len(asked), "exact_match": share([hit for hits in right.values() for hit in hits])}
    return figures | {f"exact_match_{kind.replace(' ', '_')}": share(hits) for kind, hits in right.items()}


def measure_descriptions(answer: Callable[[Asked], str], pictures: Sequence[Picture]) -> dict[str, float]:
    """How many pictures there were, and the share that is described exactly."""
    asked = [(picture, DESCRIPTION_QUESTIONS[0]) for picture in pictures]
    hits = [said.result() == describe(picture.scene) for (picture, _), said in ahead(answer, asked, REQUESTS)]
    return {"descriptions": len(hits), "described_exactly": share(hits)}


def measure_boxes(locate: Callable[[Asked], Box | None], pictures: Sequence[Picture], most: int) -> dict[str, float]:
    """How many phrases there were, `most` at most, accuracy at IoU 0.5, and the mean overlap."""
    phrases = held_out_phrases([picture.scene for picture in pictures], most)
    asked = [(pictures[index], phrase.text) for index, phrase in phrases]
    overlaps: list[float] = []
    for (_, phrase), ((picture, _), found) in zip(phrases, ahead(locate, asked, REQUESTS), strict=True):
        box = found.result()
        overlaps.append(0.0 if box is None else overlap(box, picture.scene.shapes[phrase.target].box))
    hits = share([value >= ENOUGH for value in overlaps])
    return {"phrases": len(overlaps), "box_accuracy": hits, "mean_iou": round(sum(overlaps) / len(overlaps), 4)}


def share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


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
    with Client(options.url) as client:
        found = client.model(options.model)
        name = f"{found.id}@{found.version}"
        answer = answering(OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0), name)
        figures = measure_answers(answer, pictures, options.questions)
        figures |= measure_descriptions(answer, pictures[: options.descriptions])
        figures |= measure_boxes(locating(client, name), pictures, options.phrases)
    print(f"{name}: {json.dumps(figures)}")
    for role in ROLES if options.record else ():
        record(options.record / f"{found.id}.{role}" / str(found.version), figures)


if __name__ == "__main__":
    main()
