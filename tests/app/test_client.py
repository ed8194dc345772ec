"""The client against a real gateway, and against everything that is none."""

import math
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.client import Client, ClientError, read_grids
from app.token_format import TokenGrids, pack
from tests.detector_repository import add_detector, add_grounder, in_frame, letterbox
from tests.factories import encode
from tests.gateway import free_port, gateway
from tests.repository import LABELS, add_entry, make_images, make_repository
from tests.tokenizer_repository import CODEBOOK, GRID, STEP, add_tokenizer, image_of, tokens_of

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
BLUE = encode(Image.new("RGB", (30, 40), (10, 10, 200)), "JPEG")
BROKEN = RED[:60]
TOKEN_FORMAT = Path(__file__).parents[2] / "docs/token-format.md"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    repository = make_repository(tmp_path_factory.mktemp("client") / "repository")
    add_entry(repository, version=2)
    add_tokenizer(repository)
    add_detector(repository, in_frame([[4, 6, 30, 20]], letterbox(), (40, 30)), [0.9], [1], masks=True)
    add_detector(repository, in_frame([[4, 6, 30, 20]], letterbox(), (40, 30)), [10], [1], name="open", phrases=2)
    add_grounder(repository, in_frame([[4, 6, 30, 20]], letterbox("centre"), (40, 30)))
    (add_entry(repository, "broken").path / "model.onnx").unlink()
    with gateway(repository, default_classify="colours", default_detect="shapes") as url, Client(url) as client:
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


def test_one_model_with_its_manifest(client: Client) -> None:
    newest, first = client.model("colours"), client.model("colours@1")
    assert (newest.id, newest.task, newest.versions) == ("colours", "classify", (2, 1))
    assert newest.manifest is not None
    assert first.manifest is not None
    assert tuple(newest.manifest["labels"]) == LABELS
    assert newest.manifest["engine"]["sha256"] != first.manifest["engine"]["sha256"]
    assert client.model("broken").manifest is None
    with pytest.raises(ClientError) as error:
        client.model("no such model?")
    assert error.value.code == "model_not_found"


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
            "/json/v1/tokenize": ("application/json", b"{}", 200),
            "/problem/v1/models": ("application/problem+json", b'{"title": "Bad gateway"}', 502),
        }.get(self.path, ("", b"", 0))
        if status:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

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


def test_a_stranger_has_no_tokens(stranger: str) -> None:
    with Client(f"{stranger}/json/") as client, pytest.raises(ClientError) as caught:
        client.tokenize(RED)
    assert caught.value.code == "not_vitrine"


@pytest.mark.parametrize(
    ("path", "code"), [("json", "not_vitrine"), ("html", "not_vitrine"), ("problem", "not_vitrine"), ("silence", "unreachable")]
)
def test_a_stranger_answers(stranger: str, path: str, code: str) -> None:
    with Client(f"{stranger}/{path}/") as client, pytest.raises(ClientError) as caught:
        client.models()
    assert caught.value.code == code


def block_image(seed: int) -> bytes:
    return encode(Image.fromarray(make_images(1, size=32, seed=seed)[0]), "PNG")


def test_tokens_and_back(client: Client, tmp_path: Path) -> None:
    pixels = np.concatenate([make_images(1, size=32, seed=seed) for seed in (0, 1)])
    answer = client.tokenize([block_image(0), block_image(1)], psnr=True)
    assert (answer.model, answer.version, len(answer.id) > 8) == ("greys", 1, True)
    assert (answer.grids.codebook, answer.grids.size) == (CODEBOOK.id, CODEBOOK.size)
    assert np.array_equal(answer.grids.tokens[:, 0], tokens_of(pixels))
    assert answer.psnr is not None
    assert [10 < ratio < 40 for ratio in answer.psnr] == [True, True]

    images = [item.reconstruction for item in client.detokenize(answer.grids, model="greys@1").results]
    assert all(image is not None and (image.media_type, image.width, image.height) == ("image/png", 32, 32) for image in images)
    decoded = np.stack([np.asarray(Image.open(BytesIO(image.data))) for image in images])
    assert np.array_equal(decoded, image_of(tokens_of(pixels)))

    saved = tmp_path / "photo.vtok"
    saved.write_bytes(pack(answer.grids))
    assert [item.reconstruction for item in client.detokenize(saved).results] == images
    assert [item.reconstruction for item in client.detokenize(saved.read_bytes()).results] == images
    assert np.array_equal(read_grids(saved).tokens, answer.grids.tokens)


def test_tokens_are_not_measured_unless_asked(client: Client) -> None:
    assert client.tokenize(block_image(0)).psnr is None


def test_one_photo_without_tokens_refuses_the_request(client: Client) -> None:
    with pytest.raises(ClientError, match="Image 1, counted from 0") as caught:
        client.tokenize([block_image(0), BROKEN])
    assert (caught.value.code, caught.value.status) == ("undecodable_image", 422)


def test_reconstruct(client: Client) -> None:
    flat = encode(Image.new("RGB", (32, 32), (STEP // 2,) * 3), "PNG")  # what the codes keep exactly
    photo, broken, exact = client.reconstruct([block_image(0), BROKEN, flat]).results
    assert photo.reconstruction is not None
    pixels = np.asarray(Image.open(BytesIO(photo.reconstruction.data)))
    assert np.array_equal(pixels, image_of(tokens_of(make_images(1, size=32, seed=0)))[0])
    assert 10 < photo.psnr < 40
    assert 0 < photo.ssim < 1
    assert photo.image is not None
    assert (broken.reconstruction, broken.psnr, broken.error and broken.error.code) == (None, None, "undecodable_image")
    assert (exact.psnr, exact.ssim) == (math.inf, pytest.approx(1))


def test_detect(client: Client) -> None:
    answer = client.detect([RED, BROKEN], threshold=0.5, classes=["square", 0], masks=True, render=True)
    assert (answer.model, answer.version) == ("shapes", 1)
    found, broken = answer.results
    assert broken.error is not None
    assert found.detections is not None
    assert found.rendered is not None
    (one,) = found.detections
    assert (one.label, one.class_id, one.score) == ("square", 1, pytest.approx(0.9))
    assert one.box == pytest.approx((4, 6, 30, 20), abs=0.02)
    assert one.mask is not None
    assert one.mask.size == (30, 40)
    assert found.rendered.data.startswith(b"\x89PNG")
    assert client.detect(RED, max_detections=1, classes=["Dreieck"]).results[0].detections == ()


def test_detect_phrases(client: Client) -> None:
    (one,) = client.detect(RED, model="open", phrases=["left", "red circle"], threshold=0.1).results[0].detections or ()
    assert (one.label, one.class_id, one.score) == ("red circle", 1, pytest.approx(0.4))


def test_ground(client: Client) -> None:
    answer = client.ground(RED, ["the red circle", "left"])
    assert [one.phrase for one in answer.results[0].groundings or ()] == ["the red circle", "left"]
    (one,) = client.ground(RED, "red", render=True).results[0].groundings or ()
    assert one.box == pytest.approx((4, 6, 30, 20), abs=0.02)
    assert one.score is None
    with pytest.raises(ClientError) as refused:
        client.ground(RED, " ")
    assert refused.value.code == "invalid_value"


def test_the_documented_program(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"^```py\n(.*?)^```$", TOKEN_FORMAT.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(block_image(0))
    Path("photo.vtok").write_bytes(pack(client.tokenize(block_image(0)).grids))
    names = {"Client": Client, "Path": Path}
    exec(program.replace("http://127.0.0.1:8000", client.url), names)
    assert np.array_equal(names["grids"].tokens[:, 0], tokens_of(make_images(1, size=32, seed=0)))
    assert names["again"].results[0].reconstruction.data == names["image"]


GRIDS = TokenGrids(np.zeros((1, 1, *GRID), np.int32), CODEBOOK.id, CODEBOOK.size)


@pytest.mark.parametrize(
    ("grids", "code", "status", "words"),
    [
        (replace(GRIDS, codebook="ab" * 32), "invalid_value", 422, "codebook"),
        (replace(GRIDS, tokens=GRIDS.tokens[..., :3]), "invalid_value", 422, "A grid of this model's tokens is"),
        (replace(GRIDS, tokens=GRIDS.tokens + 16), "invalid_value", None, "tokens must be 0 to 15."),
        (pack(GRIDS)[:-1], "malformed_tokens", None, "is cut off"),
        (Path("none.vtok"), "unreadable", None, "none.vtok cannot be read"),
    ],
)
def test_grids_that_cannot_be_used(client: Client, grids, code: str, status: int | None, words: str) -> None:
    with pytest.raises(ClientError, match=words) as caught:
        client.detokenize(grids)
    assert (caught.value.code, caught.value.status) == (code, status)


def test_a_saved_file_that_is_no_container_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.vtok").write_bytes(RED)
    with pytest.raises(ClientError, match=r"photo.vtok: This is no token container"):
        read_grids(tmp_path / "photo.vtok")
