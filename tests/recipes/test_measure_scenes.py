"""Who answers with the truth about scenes is told so, and who does not is told how often."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import scenes
from measure_chat import Asked, answering, locating, measure_answers, measure_boxes, measure_descriptions
from measure_encoder import classifying, measure
from openai import OpenAI
from scene_words import DESCRIPTIONS, QUESTION_KINDS, describe, questions, simple_phrases
from scenes import Picture

from app.client import Box, Client
from tests.chat_repository import NAME, add_chat
from tests.dual_repository import add_dual_encoder
from tests.gateway import gateway


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [scenes.draw(number, size=64) for number in range(70)]


def the_truth(asked: Asked) -> str:
    picture, text = asked
    every = (question for kind in QUESTION_KINDS for question in questions(picture.scene, kind))
    return next((question.answer for question in every if question.text == text), describe(picture.scene))


def the_place(asked: Asked) -> Box:
    picture, text = asked
    (target,) = (phrase.target for phrase in simple_phrases(picture.scene) if phrase.text == text)
    return picture.scene.shapes[target].box


def test_the_truth_is_right(pictures: list[Picture]) -> None:
    figures = measure_answers(the_truth, pictures, 50)
    assert figures == {
        "questions": 50,
        "exact_match": 1,
        **{f"exact_match_{kind.replace(' ', '_')}": 1 for kind in QUESTION_KINDS},
    }
    assert measure_descriptions(the_truth, pictures[:20]) == {"descriptions": 20, "described_exactly": 1}
    assert measure_boxes(the_place, pictures, 50) == {"phrases": 50, "box_accuracy": 1, "mean_iou": 1}


def test_what_is_wrong_counts(pictures: list[Picture]) -> None:
    figures = measure_answers(lambda asked: "red", pictures, 50)
    assert 0 < figures["exact_match_colour"] < 1
    assert figures["exact_match"] == pytest.approx(figures["exact_match_colour"] / 5, abs=1e-3)
    assert measure_boxes(lambda asked: None, pictures, 5) == {"phrases": 5, "box_accuracy": 0, "mean_iou": 0}


def test_own_descriptions_among_fifty(pictures: list[Picture]) -> None:
    asked: list[int] = []

    def truth(some: Sequence[Picture], labels: Sequence[str]) -> list[str]:
        asked.append(len(labels))
        said = {form(picture.scene) for picture in some for form in DESCRIPTIONS.values()}
        return [next(label for label in labels if label in said and label in describes(picture)) for picture in some]

    def describes(picture: Picture) -> set[str]:
        return {form(picture.scene) for form in DESCRIPTIONS.values()}

    figures = measure(truth, pictures)
    assert set(asked) == {50}
    assert figures == {
        "zero_shot_among": 50,
        **{f"images_{name}": 50 for name in DESCRIPTIONS},
        **{f"zero_shot_{name}": 1 for name in DESCRIPTIONS},
    }
    assert measure(lambda some, labels: [labels[0]] * len(some), pictures)["zero_shot_places"] == pytest.approx(1 / 50)


def test_a_gateway_is_asked(tmp_path: Path, pictures: list[Picture]) -> None:
    """Models that know nothing of scenes answer what they always do."""
    add_chat(tmp_path / "repository", max_length=256)
    add_dual_encoder(tmp_path / "repository")
    with gateway(tmp_path / "repository") as url, Client(url) as client:
        assert client.model(NAME).version == client.model("colour-clip").version == 1
        answer = answering(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), f"{NAME}@1")
        assert answer((pictures[0], "abc")).startswith("<=>")
        assert locating(client, f"{NAME}@1")((pictures[0], "the red star")) is None
        labels = ["red red", "blue blue"]
        assert set(classifying(client, "colour-clip@1")(pictures[:3], labels)) <= set(labels)
