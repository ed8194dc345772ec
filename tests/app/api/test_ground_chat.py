"""`POST /v1/ground` on a chat model: the box that it names in what it saw, as a box of the original."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.api.schemas import GroundResponse
from app.main import create_app
from app.settings import Settings
from tests.app.api.test_health import wait_until_ready
from tests.chat_repository import add_chat, let_say
from tests.factories import encode, make_exif, make_image, make_jpeg

SIZE = (150, 90)  # seen as 28 x 16
SAID = '```json [{"bbox_2d": [7, 4, 14, 40], "label": "cup"}]'


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("chat") / "repository"
    let_say(add_chat(root, "pointer", max_length=250), "<", SAID)
    let_say(add_chat(root, "turned", max_length=250), "<", '"bbox_2d": [9, 9, 1, 1]')
    add_chat(root, "mute", max_length=250)
    add_chat(root, "short")
    settings = Settings(_env_file=None, repository=root, repository_poll=0, default_chat="mute")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def test_a_box_in_pixels_of_the_original(client: TestClient) -> None:
    params = {"model": "pointer", "phrase": ["the cup", "another"]}
    answer = client.post("/v1/ground", params=params, content=make_jpeg(*SIZE)).json()
    GroundResponse.model_validate(answer)
    assert (answer["model"], answer["version"], answer["task"]) == ("pointer", 1, "ground")
    groundings = answer["results"][0]["groundings"]
    assert [found["phrase"] for found in groundings] == ["the cup", "another"]
    for found in groundings:
        assert found["box"] == [37.5, 22.5, 75.0, 90.0]  # cut off at the lower edge
        assert found["score"] is None


def test_the_original_is_upright(client: TestClient) -> None:
    photo = encode(make_image(90, 150), "JPEG", exif=make_exif(6))
    answer = client.post("/v1/ground", params={"model": "pointer", "phrase": "cup"}, content=photo).json()
    (result,) = answer["results"]
    assert (result["image"]["width"], result["image"]["height"]) == SIZE
    assert result["groundings"][0]["box"] == [37.5, 22.5, 75.0, 90.0]


@pytest.mark.parametrize("model", ["mute", "turned"])
def test_no_box_is_told_as_none(client: TestClient, model: str) -> None:
    answer = client.post("/v1/ground", params={"model": model, "phrase": "cup", "render": "true"}, content=make_jpeg(*SIZE)).json()
    (result,) = answer["results"]
    assert result["groundings"][0]["box"] is None
    assert (result["rendered"]["width"], result["rendered"]["height"]) == SIZE


def test_the_box_is_drawn(client: TestClient) -> None:
    photo = encode(Image.new("RGB", SIZE, "white"), "PNG")
    params = {"model": "pointer", "phrase": "cup"}
    answer = client.post("/v1/ground", params=params, content=photo, headers={"Accept": "image/png"})
    assert answer.headers["x-model"] == "pointer@1"
    with Image.open(BytesIO(answer.content)) as drawn:
        assert drawn.size == SIZE
        assert drawn.convert("RGB").getpixel((37, 50)) != (255, 255, 255)
        assert drawn.convert("RGB").getpixel((120, 50)) == (255, 255, 255)


def test_images_fail_alone_and_phrases_together(client: TestClient) -> None:
    files = [("image", b"none"), ("image", make_jpeg(*SIZE))]
    answer = client.post("/v1/ground", params={"model": "pointer", "phrase": "cup"}, files=files).json()
    assert [result.get("error", {}).get("code") for result in answer["results"]] == ["unsupported_media", None]
    for model, phrase in (("pointer", " "), ("pointer", "<|image|>"), ("short", "cup")):
        refused = client.post("/v1/ground", params={"model": model, "phrase": phrase}, content=make_jpeg(*SIZE))
        assert (refused.status_code, refused.json()["field"]) == (422, "phrase")


def test_the_default_is_loaded_before_the_server_is_ready(tmp_path: Path) -> None:
    add_chat(tmp_path, "pointer")
    add_chat(tmp_path, "other")
    settings = Settings(_env_file=None, repository=tmp_path, repository_poll=0, default_ground="pointer")
    with TestClient(create_app(settings.model_copy(update={"preload": False}))) as client:
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["pointer is not loaded yet"])
    with TestClient(create_app(settings)) as client:
        wait_until_ready(client)
        models = {model["id"]: model["status"] for model in client.get("/v1/models").json()["data"]}
        assert models == {"pointer": "ready", "other": "available"}


def test_a_chat_model_grounds_only_where_it_is_named(client: TestClient) -> None:
    assert client.post("/v1/ground", params={"phrase": "cup"}, content=make_jpeg(*SIZE)).status_code == 404
    assert client.post("/v1/classify", params={"model": "pointer"}, content=make_jpeg(*SIZE)).status_code == 404
