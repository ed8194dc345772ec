"""`POST /v1/ground` as a client sees it: a real engine that answers a phrase with the box of its first word."""

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.api.schemas import GroundResponse
from app.main import create_app
from app.settings import Settings
from tests.detector_repository import LENGTH, WORDS, add_grounder, in_frame, letterbox
from tests.factories import encode, make_exif, make_image, make_jpeg

SIZE = (151, 97)
PHOTO = make_jpeg(*SIZE)
BOXES = [[10.0 * number, 5.5, 10.0 * number + 25.25, 30.0 + 9 * number] for number in range(len(WORDS))]
INSIDE = [[left, top, right, min(bottom, 97)] for left, top, right, bottom in BOXES]


@contextmanager
def serving(directory: Path, **settings: Any) -> Iterator[TestClient]:
    app = create_app(Settings(_env_file=None, repository=directory, repository_poll=0, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    repository = tmp_path_factory.mktemp("repository")
    shares = in_frame(BOXES, letterbox("centre"), SIZE)
    add_grounder(repository, shares)
    add_grounder(repository, shares, name="patient", too_long="truncate", score=True)
    with serving(repository, default_ground="phrases", max_images=6) as client:
        yield client


def box_of(word: str) -> list[float]:
    return INSIDE[WORDS.index(word)]


def test_one_phrase(client: TestClient) -> None:
    answer = client.post("/v1/ground", params={"phrase": "Red circle"}, content=PHOTO).json()
    GroundResponse.model_validate(answer)
    assert (answer["model"], answer["task"], answer["warnings"]) == ("phrases", "ground", [])
    (grounding,) = answer["results"][0]["groundings"]
    assert (grounding["phrase"], grounding["score"], grounding["truncated"]) == ("Red circle", None, False)
    np.testing.assert_allclose(grounding["box"], box_of("red"), atol=0.02)


@pytest.mark.parametrize("how", ["query", "form", "json"])
def test_several_phrases_keep_their_order_in_every_image(client: TestClient, how: str) -> None:
    phrases, files = ["blue square", "left", "circle"], [("image", PHOTO)] * 2
    if how == "query":
        response = client.post("/v1/ground", params={"phrase": phrases}, files=files)
    elif how == "form":
        response = client.post("/v1/ground", data={"phrase": phrases}, files=files)
    else:
        image = {"base64": b64encode(PHOTO).decode()}
        response = client.post("/v1/ground", json={"images": [image] * 2, "phrase": phrases})
    results = response.json()["results"]
    assert len(results) == 2
    for result in results:
        assert [one["phrase"] for one in result["groundings"]] == phrases
        expected = [box_of(word) for word in ("blue", "left", "circle")]
        np.testing.assert_allclose([one["box"] for one in result["groundings"]], expected, atol=0.02)


@pytest.mark.parametrize("size", [(151, 97), (97, 151), (400, 31), (33, 300)])
@pytest.mark.parametrize("orientation", [1, 8])
def test_boxes_are_in_pixels_of_the_upright_original(tmp_path: Path, size: tuple[int, int], orientation: int) -> None:
    width, height = size
    box = [0.125 * width, 0.3 * height, 0.77 * width, 0.99 * height]
    add_grounder(tmp_path, in_frame([box], letterbox("centre"), size))
    stored = size if orientation < 5 else size[::-1]
    photo = encode(make_image(*stored), "JPEG", exif=make_exif(orientation))
    with serving(tmp_path) as client:
        answer = client.post("/v1/ground?phrase=red", content=photo).json()
    np.testing.assert_allclose(answer["results"][0]["groundings"][0]["box"], box, atol=0.02)


@pytest.mark.parametrize("phrase", ["红色圆圈", "الدائرة", "красный круг", "🔴", "rød & grøn"])
def test_other_scripts_are_read_and_come_back_as_they_were(client: TestClient, phrase: str) -> None:
    """The vocabulary knows none of these words."""
    response = client.post("/v1/ground", params={"phrase": phrase, "model": "patient"}, content=PHOTO)
    (grounding,) = response.json()["results"][0]["groundings"]
    assert grounding["phrase"] == phrase
    np.testing.assert_allclose(grounding["box"], box_of("[UNK]"), atol=0.02)
    drawn = client.post("/v1/ground", params={"phrase": phrase, "model": "patient"}, content=PHOTO, headers={"Accept": "image/png"})
    assert Image.open(BytesIO(drawn.content)).size == SIZE


LONG = "red blue circle square left"


def test_a_phrase_too_long_is_cut_off_where_the_model_says_so_and_that_is_told(client: TestClient) -> None:
    answer = client.post("/v1/ground", params={"phrase": ["red", LONG], "model": "patient"}, content=PHOTO).json()
    short, long = answer["results"][0]["groundings"]
    assert (short["truncated"], long["truncated"]) == (False, True)
    np.testing.assert_allclose([short["score"], long["score"]], [0.3, LENGTH / 10], atol=1e-6)


@pytest.mark.parametrize(
    ("phrases", "code", "words"),
    [
        ([""], "invalid_value", "The phrase is empty"),
        (["red", " \t"], "invalid_value", "The phrase is empty"),
        ([LONG], "invalid_value", f"makes 7 tokens, the model takes {LENGTH}"),
        ([], "invalid_value", "phrase: Field required"),
        (["red"] * 7, "too_large", "7 inferences in one request; this server takes 6"),
    ],
)
def test_phrases_that_cannot_be_read(client: TestClient, phrases: list[str], code: str, words: str) -> None:
    response = client.post("/v1/ground", params={"phrase": phrases}, content=PHOTO)
    problem = response.json()
    assert (problem["code"], problem["field"]) == (code, "phrase")
    assert words in problem["detail"]


def test_half_a_surrogate_pair_is_no_phrase(client: TestClient) -> None:
    body = b'{"image": "data:image/jpeg;base64,' + b64encode(PHOTO) + b'", "phrase": "red \\ud83d"}'
    response = client.post("/v1/ground", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["field"]) == (422, "phrase")


def test_an_image_without_an_answer_does_not_stop_the_others(client: TestClient) -> None:
    files = [("image", PHOTO), ("image", b"no image"), ("image", PHOTO)]
    results = client.post("/v1/ground?phrase=red&phrase=left", files=files).json()["results"]
    assert [result.get("error", {}).get("code") for result in results] == [None, "unsupported_media", None]
    assert results[0]["groundings"] == results[2]["groundings"]


def test_the_picture_shows_every_phrase(client: TestClient) -> None:
    phrases = ["circle", "left"]
    response = client.post("/v1/ground", params={"phrase": phrases}, content=PHOTO, headers={"Accept": "image/png"})
    assert (response.headers["Content-Type"], response.headers["X-Model"]) == ("image/png", "phrases@1")
    drawn = np.asarray(Image.open(BytesIO(response.content))).astype(int)
    difference = np.abs(drawn - np.asarray(Image.open(BytesIO(PHOTO)).convert("RGB"))).sum(2)
    for word in phrases:
        left, _, right, bottom = (round(place) for place in box_of(word))
        assert difference[bottom - 1, left + 1 : right - 1].mean() > 30
