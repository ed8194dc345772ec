"""The client against a real gateway, and against everything that is none."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from app.client import Client, ClientError
from tests.factories import encode
from tests.gateway import free_port, gateway
from tests.repository import LABELS, add_entry, make_repository

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
BLUE = encode(Image.new("RGB", (30, 40), (10, 10, 200)), "JPEG")
BROKEN = RED[:60]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    repository = make_repository(tmp_path_factory.mktemp("client") / "repository")
    add_entry(repository, version=2)
    (add_entry(repository, "broken").path / "model.onnx").unlink()
    with gateway(repository, default_classify="colours") as url, Client(url) as client:
        yield client


def test_one_photo(client: Client, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(RED)
    answer = client.classify(photo, top_k=2)
    (item,) = answer.results
    assert (answer.model, answer.version, len(answer.id) > 8) == ("colours", 2, True)
    assert item.predictions is not None
    assert item.predictions[0].label == "red"
    assert len(item.predictions) == 2
    assert item.predictions[0].score > item.predictions[1].score
    assert item.image is not None
    assert (item.image.format, item.image.width, item.image.height) == ("PNG", 40, 30)


def test_an_older_version(client: Client) -> None:
    new, old = client.classify(RED), client.classify(RED, model="colours@1")
    assert (new.version, old.version) == (2, 1)
    assert new.results[0].predictions[0].score > old.results[0].predictions[0].score


def test_several_photos_keep_their_order_and_their_own_errors(client: Client) -> None:
    answer = client.classify([BLUE, BROKEN, RED])
    labels = [item.predictions and item.predictions[0].label for item in answer.results]
    assert labels == ["blue", None, "red"]
    assert answer.results[1].error is not None
    assert (answer.results[1].error.code, answer.results[1].error.status) == ("undecodable_image", 422)


def test_several_photos_that_all_fail_still_say_each_why(client: Client) -> None:
    answer = client.classify([BROKEN, b"text"])
    assert [item.error and item.error.code for item in answer.results] == ["undecodable_image", "unsupported_media"]


@pytest.mark.parametrize(
    ("photo", "options", "code", "status"),
    [
        (b"text", {}, "unsupported_media", 415),
        (BROKEN, {}, "undecodable_image", 422),
        (RED, {"model": "nothing"}, "model_not_found", 404),
        (RED, {"model": "broken"}, "model_unavailable", 503),
        (RED, {"top_k": 99}, "invalid_value", 422),
        ([], {}, "malformed_request", 400),
    ],
)
def test_a_refusal_is_an_error_with_the_servers_words(client: Client, photo, options, code: str, status: int) -> None:
    with pytest.raises(ClientError) as caught:
        client.classify(photo, **options)
    assert (caught.value.code, caught.value.status) == (code, status)
    assert caught.value.request_id
    assert caught.value.detail.endswith(".")


def test_models(client: Client) -> None:
    models = {model.id: model for model in client.models()}
    assert models["colours"].versions == (2, 1)
    assert (models["colours"].status, models["colours"].engine, models["colours"].default) == ("ready", "onnx", True)
    assert models["broken"].status == "failed"
    assert "missing" in models["broken"].problems[0]


def test_ready(client: Client) -> None:
    assert client.ready()


def test_top_k_of_all_labels(client: Client) -> None:
    predictions = client.classify(RED, top_k=len(LABELS)).results[0].predictions
    assert {prediction.label for prediction in predictions} == set(LABELS)


def test_a_file_that_cannot_be_read(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="No such file") as caught:
        client.classify(tmp_path / "none.jpg")
    assert (caught.value.code, caught.value.status) == ("unreadable", None)


def test_nobody_listens() -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.ready()
        with pytest.raises(ClientError, match="Nothing answers at http://127") as caught:
            client.models()
    assert caught.value.code == "unreachable"


def test_nobody_answers_in_time() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.2) as client,
        pytest.raises(ClientError, match="in time") as caught,
    ):
        client.models()
    assert caught.value.code == "timeout"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/x", "http://", "", "http://host:port"])
def test_not_an_address(url: str) -> None:
    with pytest.raises(ClientError, match="is not an address"):
        Client(url)


class Stranger(BaseHTTPRequestHandler):
    """A web server that is no gateway: JSON of another shape, a problem document without a code, a closed connection."""

    def do_GET(self) -> None:
        kind, body, status = {
            "/json/v1/models": ("application/json", b'{"data": "none"}', 200),
            "/html/v1/models": ("text/html", b"<html>", 502),
            "/problem/v1/models": ("application/problem+json", b'{"title": "Bad gateway"}', 502),
        }.get(self.path, ("", b"", 0))
        if status:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "code"), [("json", "not_vitrine"), ("html", "not_vitrine"), ("problem", "not_vitrine"), ("silence", "unreachable")]
)
def test_a_stranger_answers(stranger: str, path: str, code: str) -> None:
    with Client(f"{stranger}/{path}/") as client, pytest.raises(ClientError) as caught:
        client.models()
    assert caught.value.code == code
