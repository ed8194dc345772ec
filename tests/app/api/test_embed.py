"""`/v1/embed`, `/v1/similarity` and labels on `/v1/classify` as a client sees them: a real dual encoder of colours."""

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app import metrics
from app.api.schemas import ClassifyResponse, EmbedResponse, SimilarityResponse
from app.main import create_app
from app.settings import Settings
from tests.dual_repository import LENGTH, SCALE, add_dual_encoder, text_vector
from tests.factories import encode
from tests.repository import add_entry

RED, BLUE = (encode(Image.new("RGB", (40, 30), colour), "PNG") for colour in ((250, 20, 20), (10, 10, 200)))
RED_VECTOR, BLUE_VECTOR = (np.array(colour) / np.linalg.norm(colour) for colour in ((250, 20, 20), (10, 10, 200)))
LABELS = ["red", "green", "blue"]
LONG = "red " * LENGTH


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    repository = tmp_path_factory.mktemp("repository")
    add_dual_encoder(repository)
    add_dual_encoder(repository, "sure", activation="sigmoid", bias=-10.0)
    add_entry(repository, "colours")
    settings = Settings(
        _env_file=None,
        repository=repository,
        repository_poll=0,
        default_classify="colours",
        default_embed="colour-clip",
        max_texts=12,
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def softmax(logits: Any) -> Any:
    exponents = np.exp(logits - np.max(logits))
    return exponents / exponents.sum()


def test_an_image_as_it_is_becomes_a_vector_of_unit_length(client: TestClient) -> None:
    answer = client.post("/v1/embed", content=RED).json()
    EmbedResponse.model_validate(answer)
    assert (answer["model"], answer["task"], answer["warnings"]) == ("colour-clip", "embed", [])
    (item,) = answer["results"]
    assert (item["image"]["width"], item["image"]["height"]) == (40, 30)
    np.testing.assert_allclose(item["embedding"], RED_VECTOR, atol=1e-5)


@pytest.mark.parametrize("how", ["query", "form", "json"])
def test_images_come_before_texts(client: TestClient, how: str) -> None:
    texts = ["red", "Dark  BLUE"]
    if how == "query":
        response = client.post("/v1/embed", params={"texts": texts}, files=[("image", RED), ("image", BLUE)])
    elif how == "form":
        response = client.post("/v1/embed", data={"texts": texts}, files=[("image", RED), ("image", BLUE)])
    else:
        images = [{"base64": b64encode(image).decode()} for image in (RED, BLUE)]
        response = client.post("/v1/embed", json={"images": images, "texts": texts})
    results = response.json()["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3]
    expected = [RED_VECTOR, BLUE_VECTOR, text_vector("red"), text_vector("dark blue")]
    np.testing.assert_allclose([result["embedding"] for result in results], expected, atol=1e-5)
    assert [result.get("tokens") for result in results] == [None, None, 3, 4]


@pytest.mark.parametrize("how", ["query", "json"])
def test_texts_alone(client: TestClient, how: str) -> None:
    asked = {"params": {"texts": "red"}} if how == "query" else {"json": {"texts": "red"}}
    (item,) = client.post("/v1/embed", **asked).json()["results"]
    np.testing.assert_allclose(item["embedding"], text_vector("red"), atol=1e-5)
    assert item["truncated"] is False


def test_a_text_too_long_is_cut_off_and_that_is_told(client: TestClient) -> None:
    (item,) = client.post("/v1/embed", json={"texts": f"{LONG} blue blue blue blue"}).json()["results"]
    assert (item["truncated"], item["tokens"]) == (True, LENGTH)
    np.testing.assert_allclose(item["embedding"], text_vector("red"), atol=1e-5)


def test_what_has_no_answer_does_not_stop_the_others(client: TestClient) -> None:
    files = [("image", RED), ("image", b"no image")]
    results = client.post("/v1/embed", files=files, data={"texts": ["red", " ", "blue"]}).json()["results"]
    codes = [result.get("error", {}).get("code") for result in results]
    assert codes == [None, "unsupported_media", None, "invalid_value", None]
    assert results[3]["error"]["field"] == "texts"


@pytest.mark.parametrize(
    ("path", "asked", "status", "field"),
    [
        ("/v1/embed", {}, 400, "texts"),
        ("/v1/embed", {"texts": ""}, 422, "texts"),
        ("/v1/embed", {"texts": ["red"] * 13}, 413, "texts"),
        ("/v1/embed", {"texts": "red", "model": "nothing"}, 404, "model"),
        ("/v1/embed", {"texts": "red", "model": "colours"}, 404, "model"),
        ("/v1/embed", {"texts": [1]}, 422, "texts.0"),
        ("/v1/similarity", {"texts": "red"}, 400, "image"),
    ],
)
def test_requests_that_cannot_be_answered(client: TestClient, path: str, asked: dict[str, Any], status: int, field: str) -> None:
    problem = client.post(path, json=asked).json()
    assert (problem["status"], problem["field"]) == (status, field)


def test_similarity_is_a_matrix_of_images_and_texts(client: TestClient) -> None:
    response = client.post("/v1/similarity", params={"texts": LABELS}, files=[("image", RED), ("image", BLUE)])
    SimilarityResponse.model_validate(response.json())
    results = response.json()["results"]
    cosines = np.stack([RED_VECTOR, BLUE_VECTOR]) @ np.stack([text_vector(label) for label in LABELS]).T
    np.testing.assert_allclose([result["similarities"] for result in results], cosines, atol=1e-5)
    expected = [softmax(SCALE * row) for row in cosines]
    np.testing.assert_allclose([result["probabilities"] for result in results], expected, atol=1e-4)


def test_similarity_says_which_text_was_cut_off(client: TestClient) -> None:
    answer = client.post("/v1/similarity", params={"texts": ["red", LONG]}, content=RED).json()
    assert answer["warnings"] == [f"{LONG[:100]!r} is too long for the model; its end was not read."]


def test_labels_are_classified_by_cosine_and_scale(client: TestClient) -> None:
    response = client.post(
        "/v1/classify", params={"labels": LABELS, "model": "colour-clip"}, files=[("image", RED), ("image", BLUE)]
    )
    ClassifyResponse.model_validate(response.json())
    first, second = (result["predictions"] for result in response.json()["results"])
    assert (first[0]["label"], second[0]["label"]) == ("red", "blue")
    expected = softmax(SCALE * (np.stack([text_vector(label) for label in LABELS]) @ RED_VECTOR))
    for prediction in first:
        assert LABELS[prediction["class_id"]] == prediction["label"]
        assert prediction["score"] == pytest.approx(expected[prediction["class_id"]], abs=1e-4)


def test_a_model_with_a_bias_judges_each_label_for_itself(client: TestClient) -> None:
    answer = client.post("/v1/classify", params={"labels": ["red", "yellow"], "model": "sure"}, content=RED).json()
    scores = {one["label"]: one["score"] for one in answer["results"][0]["predictions"]}
    for label, score in scores.items():
        assert score == pytest.approx(1 / (1 + np.exp(10 - SCALE * text_vector(label) @ RED_VECTOR)), abs=1e-4)
    assert sum(scores.values()) > 1.2


def test_templates_are_averaged_at_unit_length(client: TestClient) -> None:
    templates = ["a {}", "dark dark {}"]
    answer = client.post(
        "/v1/classify", params={"labels": LABELS, "template": templates, "model": "colour-clip"}, content=RED
    ).json()
    means = np.stack([np.mean([text_vector(template.replace("{}", label)) for template in templates], 0) for label in LABELS])
    expected = softmax(SCALE * (means / np.linalg.norm(means, axis=1, keepdims=True)) @ RED_VECTOR)
    for prediction in answer["results"][0]["predictions"]:
        assert prediction["score"] == pytest.approx(expected[prediction["class_id"]], abs=1e-4)


def test_labels_without_a_model_go_to_the_default_that_embeds(client: TestClient) -> None:
    answer = client.post("/v1/classify", params={"labels": LABELS, "top_k": 1}, content=BLUE).json()
    assert answer["model"] == "colour-clip"
    assert [one["label"] for one in answer["results"][0]["predictions"]] == ["blue"]


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ({"model": "colours", "labels": LABELS}, "labels", "colours has classes of its own"),
        ({"model": "colour-clip"}, "labels", "has no classes of its own"),
        ({"labels": LABELS, "template": "no place"}, "template", "needs {}"),
        ({"template": "a {}"}, "template", "there are none"),
        ({"labels": ["red", " "]}, "labels", "empty"),
        ({"labels": LABELS, "top_k": 4}, "top_k", "between 1 and 3"),
    ],
)
def test_labels_that_do_not_fit_the_model(client: TestClient, asked: dict[str, Any], field: str, words: str) -> None:
    problem = client.post("/v1/classify", params=asked, content=RED).json()
    assert (problem["status"], problem["field"]) == (422, field)
    assert words in problem["detail"]


def test_a_default_without_classes_of_its_own_asks_for_labels(tmp_path: Path) -> None:
    add_dual_encoder(tmp_path)
    settings = Settings(_env_file=None, repository=tmp_path, repository_poll=0, default_classify="colour-clip")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        problem = client.post("/v1/classify", content=RED).json()
        assert (problem["status"], problem["field"]) == (422, "labels")
        assert "colour-clip has no classes of its own" in problem["detail"]
        assert client.post("/v1/classify", params={"labels": LABELS}, content=RED).json()["model"] == "colour-clip"


def test_labels_times_templates_have_a_limit(client: TestClient) -> None:
    asked = {"labels": LABELS, "template": ["a {}", "{} a", "{}", "dark {}", "{} dark"]}
    problem = client.post("/v1/classify", params=asked, content=RED).json()
    assert (problem["status"], problem["field"]) == (413, "labels")
    assert "15 texts" in problem["detail"]


def test_the_classifier_answers_as_before(client: TestClient) -> None:
    answer = client.post("/v1/classify", content=RED).json()
    assert (answer["model"], answer["results"][0]["predictions"][0]["label"]) == ("colours", "red")


def kept() -> tuple[float, float]:
    return tuple(metrics.TEXTS.labels(answer)._value.get() for answer in ("yes", "no"))


def test_texts_are_embedded_once(tmp_path: Path) -> None:
    add_dual_encoder(tmp_path)
    settings = Settings(_env_file=None, repository=tmp_path, repository_poll=0, text_cache=3)
    with TestClient(create_app(settings)) as client:
        hits, misses = kept()
        evicted = metrics.TEXTS_EVICTED._value.get()
        answers = [client.post("/v1/classify", params={"labels": LABELS}, content=RED).json()["results"] for _ in range(2)]
        assert answers[0] == answers[1]
        assert kept() == (hits + 3, misses + 3)
        client.post("/v1/embed", json={"texts": ["yellow", "red"]})  # red is among the kept, green must go
        assert kept() == (hits + 4, misses + 4)
        assert metrics.TEXTS_EVICTED._value.get() == evicted + 1
        client.post("/v1/embed", json={"texts": ["red", "blue", "yellow"]})
        assert kept() == (hits + 7, misses + 4)
        client.post("/v1/embed", json={"texts": ["green"]})
        assert kept() == (hits + 7, misses + 5)


def test_openapi_tells_of_the_vectors(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {parameter["name"] for parameter in paths["/v1/embed"]["post"]["parameters"]} == {"model", "texts"}
    assert {parameter["name"] for parameter in paths["/v1/similarity"]["post"]["parameters"]} == {"model", "texts"}
    assert "/v1/embeddings" in paths


def test_the_list_of_models_says_that_it_embeds(client: TestClient) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert (models["colour-clip"]["task"], models["colour-clip"]["default"]) == ("embed", True)
