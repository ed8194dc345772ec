"""`POST /v1/detect` with phrases: what a detector without classes of its own is asked to look for."""

from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.api.schemas import DetectResponse
from app.main import create_app
from app.settings import Settings
from tests.detector_repository import LENGTH, WORDS, add_detector, in_frame, letterbox
from tests.factories import make_jpeg

SIZE = (151, 97)
PHOTO = make_jpeg(*SIZE)
BOXES = [[10, 20, 101, 62], [100.5, 3.25, 140, 90], [12, 7, 60, 90]]
PLACES = 3


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """`open` finds box n for phrase n, as sure as the number of the phrase's first word; `shapes` has classes of its own."""
    repository = tmp_path_factory.mktemp("repository")
    add_detector(repository, in_frame(BOXES, letterbox(), SIZE), [1.0] * 3, [0, 1, 2], name="open", phrases=PLACES)
    add_detector(repository, in_frame(BOXES, letterbox(), SIZE), [0.9] * 3, [0, 1, 2], name="shapes")
    app = create_app(Settings(_env_file=None, repository=repository, repository_poll=0, default_detect="open"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def score(word: str) -> float:
    return WORDS.index(word) / 100


def ask(client: TestClient, phrases: list[Any], how: str = "query", **fields: Any) -> Any:
    fields = {"threshold": 0, "phrases": phrases} | fields
    if how == "query":
        return client.post("/v1/detect", params=fields, content=PHOTO)
    if how == "form":
        return client.post("/v1/detect", data=fields, files=[("image", PHOTO)] * 2)
    return client.post("/v1/detect", json=fields | {"images": [{"base64": b64encode(PHOTO).decode()}] * 2})


@pytest.mark.parametrize("how", ["query", "form", "json"])
def test_what_is_found_bears_its_phrase(client: TestClient, how: str) -> None:
    response = ask(client, ["Blue square", "red circle"], how)
    assert response.status_code == 200
    DetectResponse.model_validate(response.json())
    for result in response.json()["results"]:
        found = sorted(result["detections"], key=lambda one: one["class_id"])
        assert [(one["label"], one["class_id"]) for one in found] == [("Blue square", 0), ("red circle", 1)]
        assert [one["score"] for one in found] == pytest.approx([score("blue"), score("red")])
        np.testing.assert_allclose([one["box"] for one in found], BOXES[:2], atol=0.02)


def test_one_phrase_alone_in_json(client: TestClient) -> None:
    response = client.post("/v1/detect", json={"image": {"base64": b64encode(PHOTO).decode()}, "phrases": "red", "threshold": 0})
    assert [one["label"] for one in response.json()["results"][0]["detections"]] == ["red"]


def test_the_same_phrase_twice_is_looked_for_once(client: TestClient) -> None:
    found = ask(client, ["red", "red", "blue", "red", "red"]).json()["results"][0]["detections"]
    assert {(one["label"], one["class_id"]) for one in found} == {("red", 0), ("blue", 2)}
    assert len(found) == 2


def test_classes_choose_among_phrases(client: TestClient) -> None:
    found = ask(client, ["red", "blue", "left"], classes=["Blue", 2]).json()["results"][0]["detections"]
    assert {one["label"] for one in found} == {"blue", "left"}
    assert ask(client, ["red", "blue"], classes=[2]).json()["code"] == "invalid_value"


@pytest.mark.parametrize(
    ("phrases", "words"),
    [
        ([], "say in phrases what to look for"),
        ([""], "empty"),
        (["red", "  "], "empty"),
        ([" ".join(["red"] * LENGTH)], f"takes {LENGTH}"),
        (["red", "blue", "left", "circle"], f"4 different phrases; the model takes {PLACES}"),
    ],
)
def test_phrases_that_cannot_be_looked_for(client: TestClient, phrases: list[str], words: str) -> None:
    response = ask(client, phrases)
    assert response.status_code == 422
    assert (response.json()["code"], response.json()["field"]) == ("invalid_value", "phrases")
    assert words in response.json()["detail"]


def test_half_a_surrogate_pair_is_no_phrase(client: TestClient) -> None:
    body = b'{"phrases": ["\\ud800"], "image": {"base64": "%s"}}' % b64encode(PHOTO)
    response = client.post("/v1/detect", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["field"]) == (422, "phrases")


def test_a_model_with_classes_takes_no_phrases(client: TestClient) -> None:
    response = ask(client, ["red"], model="shapes")
    assert (response.status_code, response.json()["field"]) == (422, "phrases")
    assert "takes no phrases" in response.json()["detail"]


def test_the_list_says_how_many_phrases_a_model_takes(client: TestClient) -> None:
    models = {model["id"]: model["phrases"] for model in client.get("/v1/models").json()["data"]}
    assert models == {"open": PLACES, "shapes": None}
    assert client.get("/v1/models/open").json()["manifest"]["text"]["phrases"] == PLACES
