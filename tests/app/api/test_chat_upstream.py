"""Chat that another server answers: what it is sent, and what its answers and its faults become. Real HTTP on the loopback."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.app.api.conftest import MakeClient
from tests.factories import make_jpeg, make_png
from tests.gateway import free_port

PATH = "/v1/chat/completions"
CHUNK = b'data: {"id":"1","choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"},"finish_reason":null}]}\n\n'
ENDED = b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]'
LAST = b'data: {"id":"1",' + ENDED + b',"usage":{"prompt_tokens":5,"completion_tokens":9}}\n\n'
DONE = b"data: [DONE]\n\n"
SECRET = "http://secret.internal:8080/v1"
STATUSES = {
    "refusing": (
        400,
        {"error": {"message": f"context is 10 tokens of /models/x, see {SECRET}", "param": "messages", "type": "x", "code": 1}},
    ),
    "picky": (422, {"detail": "Unsupported fields in the request: {'seed'}"}),
    "locked": (401, {"error": {"message": f"wrong key for {SECRET}"}}),
    "unknown": (404, {"error": {"message": "The model `x` does not exist."}}),
    "full": (429, {"error": {"message": "busy"}}),
    "broken": (500, {"error": {"message": f"Traceback of {SECRET}"}}),
    "unready": (503, {}),
    "late": (504, {}),
    "moved": (302, {}),
}
STREAMS = {
    "good": (CHUNK, b": still here\n\n", LAST, DONE),
    "unmarked": (CHUNK, LAST),
    "falling": (CHUNK,),
    "failing": (CHUNK, b'data: {"error": "' + SECRET.encode() + b'"}\n\n'),
    "stopping": (b'data: {"error": {"message": "no"}}\n\n',),
}


class Server(BaseHTTPRequestHandler):
    """Behaves as the first part of the path says; keeps what it was sent in `server.seen`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        case = self.path.removesuffix(PATH).strip("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((dict(self.headers), body))  # type: ignore[attr-defined]
        if case == "silent":
            time.sleep(1)
        if case in STATUSES:
            status, document = STATUSES[case]
            headers = {"Retry-After": "7"} if status == 429 else {"Location": "/good"} if status == 302 else {}
            self.give(status, json.dumps(document).encode(), headers)
        elif case == "page":
            self.give(200, b"<html>", {})
        elif body.get("stream"):
            self.stream(STREAMS[case])
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "length"}
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            self.give(200, json.dumps({"id": "1", "choices": [choice], "usage": usage}).encode(), {})

    def give(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def stream(self, pieces: tuple[bytes, ...]) -> None:
        """Byte by byte in the middle, so that events come in several pieces."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in pieces:
            for part in (piece[:7], piece[7:]):
                self.wfile.write(part)
                self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.seen = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def chat(make_client: MakeClient, server: ThreadingHTTPServer) -> Any:
    """`chat(case, **settings)`: a gateway in front of a server that behaves so."""

    def make(case: str, **settings: Any) -> TestClient:
        address = f"http://127.0.0.1:{server.server_port}/{case}/v1/"
        return make_client(chat_upstream=address, chat_upstream_timeout=0.3 if case == "silent" else 10, **settings)

    return make


def ask(client: TestClient, *parts: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    content: Any = [{"type": "text", "text": "What is it?"}, *parts]
    body = {"model": "any", "messages": [{"role": "user", "content": content}]} | fields
    return client.post(PATH, json=body, headers=headers)


def picture(content: bytes, media_type: str = "image/jpeg") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{base64.b64encode(content).decode()}"}}


def sent(server: Any) -> tuple[dict[str, str], dict[str, Any]]:
    (only,) = server.seen
    return only


def metric(client: TestClient, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_a_whole_answer(chat: Any) -> None:
    client = chat("good")
    before = metric(client, "vitrine_chat_tokens_total", kind="completion")
    answer = ask(client).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"]["total_tokens"] == 7
    assert answer["vitrine"] == {"images": []}
    assert metric(client, "vitrine_chat_tokens_total", kind="completion") == before + 2
    assert metric(client, "vitrine_chat_seconds_count", model="upstream", outcome="length") >= 1


def test_a_stream_passes_through_as_it_came(chat: Any) -> None:
    client = chat("good")
    count = "vitrine_chat_first_token_seconds_count"
    before, tokens = metric(client, count), metric(client, "vitrine_chat_tokens_total", kind="completion")
    answer = ask(client, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content == CHUNK + b": still here\n\n" + LAST + DONE
    assert metric(client, count) == before + 1
    assert metric(client, "vitrine_chat_tokens_total", kind="completion") == tokens + 9
    assert metric(client, "vitrine_request_seconds_count", task="chat", code="200") >= 1


def test_a_server_that_does_not_mark_the_end_is_helped_out(chat: Any) -> None:
    assert ask(chat("unmarked"), stream=True).content == CHUNK + LAST + DONE


def test_only_its_own_key_goes_there(chat: Any, server: Any) -> None:
    client = chat("good", chat_upstream_key="ours")
    headers = {"Authorization": "Bearer theirs", "Cookie": "a=b", "X-Api-Key": "theirs", "X-Request-ID": "abc"}
    assert ask(client, headers=headers).status_code == 200
    received, _ = sent(server)
    assert received["Authorization"] == "Bearer ours"
    assert received["X-Request-ID"] == "abc"
    assert "theirs" not in json.dumps(received)
    assert "Cookie" not in received


def test_without_a_key_none_goes_there(chat: Any, server: Any) -> None:
    ask(chat("good"), headers={"Authorization": "Bearer theirs"})
    assert "Authorization" not in sent(server)[0]


def test_parameters_go_on_and_nothing_is_added(chat: Any, server: Any) -> None:
    given = {"temperature": 0.5, "max_tokens": 7, "stop": ["x"], "seed": 3, "response_format": {"type": "json_object"}}
    ask(chat("good"), **given, user="me", n=1, logprobs=None)
    assert sent(server)[1] == given | {
        "model": "any",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}],
    }


def test_images_go_on_upright(chat: Any, server: Any) -> None:
    plain, turned = make_png(31, 20), make_jpeg(60, 40, orientation=6)
    answer = ask(chat("good"), picture(plain, "image/jpeg"), picture(turned)).json()
    assert answer["vitrine"]["images"] == [{"width": 31, "height": 20}, {"width": 40, "height": 60}]
    parts = sent(server)[1]["messages"][0]["content"]
    first, second = (part["image_url"]["url"].partition(";base64,") for part in parts[1:])
    assert (first[0], base64.b64decode(first[2])) == ("data:image/png", plain)
    with Image.open(BytesIO(base64.b64decode(second[2]))) as image:
        assert (second[0], image.size, image.getexif().get(0x0112)) == ("data:image/jpeg", (40, 60), None)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"no image", 415, "unsupported_media"),
        (make_jpeg(60, 40)[:500], 422, "undecodable_image"),
        (make_jpeg(200, 100), 413, "too_large"),
    ],
)
def test_a_bad_image_never_gets_there(chat: Any, server: Any, content: bytes, status: int, code: str) -> None:
    answer = ask(chat("good", max_image_pixels=10_000), picture(make_png(8, 8)), picture(content))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert error["param"] == "messages[0].content[2].image_url.url"
    assert not server.seen


@pytest.mark.parametrize(
    ("url", "detail"),
    [("https://example.com/a.png", "VITRINE_ALLOW_URLS"), ("data:image/png;base64,%%%", "base64"), ("ftp://a/b.png", "data URL")],
)
def test_addresses_are_refused_unless_allowed(chat: Any, server: Any, url: str, detail: str) -> None:
    answer = ask(chat("good"), {"type": "image_url", "image_url": {"url": url}})
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert detail in error["message"]
    assert not server.seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("case", "status", "code", "param"),
    [
        ("refusing", 400, "malformed_request", "messages"),
        ("picky", 400, "malformed_request", None),
        ("unknown", 404, "model_not_found", "model"),
        ("full", 429, "full", None),
        ("locked", 502, "upstream_failed", None),
        ("broken", 502, "upstream_failed", None),
        ("moved", 502, "upstream_failed", None),
        ("page", 502, "upstream_failed", None),
        ("unready", 503, "backend_unavailable", None),
        ("late", 504, "deadline_exceeded", None),
        ("silent", 504, "deadline_exceeded", None),
    ],
)
def test_its_faults_become_errors(chat: Any, case: str, status: int, code: str, param: str | None, stream: bool) -> None:
    answer = ask(chat(case), stream=stream)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert "://" not in answer.text
    assert "secret" not in answer.text
    assert answer.headers.get("retry-after") == {"full": "7", "unready": "1"}.get(case)


def test_what_it_says_of_the_request_is_passed_on(chat: Any) -> None:
    assert ask(chat("refusing")).json()["error"]["message"] == "context is 10 tokens of ..., see ..."
    assert ask(chat("picky")).json()["error"]["message"] == "Unsupported fields in the request: {'seed'}"


def test_one_that_is_away(make_client: MakeClient) -> None:
    client = make_client(chat_upstream=f"http://127.0.0.1:{free_port()}")
    for stream in (False, True):
        answer = ask(client, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")
        assert "127.0.0.1" not in answer.text


@pytest.mark.parametrize("case", ["falling", "failing"])
def test_a_fault_in_the_middle_is_an_event(chat: Any, case: str) -> None:
    client = chat(case)
    before = metric(client, "vitrine_chat_seconds_count", outcome="error")
    answer = ask(client, stream=True)
    assert answer.status_code == 200
    assert answer.content.startswith(CHUNK)
    assert answer.content.endswith(DONE)
    event = json.loads(answer.content.removeprefix(CHUNK).removesuffix(DONE).removeprefix(b"data: "))
    assert (event["error"]["type"], event["error"]["code"]) == ("server_error", "upstream_failed")
    assert "secret" not in answer.text
    assert metric(client, "vitrine_chat_seconds_count", outcome="error") == before + 1


def test_a_fault_before_the_first_event_is_a_status(chat: Any) -> None:
    assert ask(chat("stopping"), stream=True).status_code == 502


def test_models_that_may_be_named(chat: Any, server: Any) -> None:
    client = chat("good", chat_upstream_models="small,large")
    for fields in ({"model": "any"}, {"model": None}):
        answer = ask(client, **fields)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == "model"
        assert "small, large" in answer.json()["error"]["message"]
    assert not server.seen
    assert ask(client, model="large").status_code == 200
    assert sent(server)[1]["model"] == "large"
    assert metric(client, "vitrine_chat_seconds_count", model="large") == 1


def test_the_only_model_need_not_be_named(chat: Any, server: Any) -> None:
    assert ask(chat("good", chat_upstream_models="small"), model=None).status_code == 200
    assert sent(server)[1]["model"] == "small"


def test_limits_are_those_of_the_gateway(chat: Any, server: Any) -> None:
    client = chat("good", max_images=1, chat_max_tokens=50)
    assert ask(client, picture(make_png()), picture(make_png())).status_code == 413
    answer = ask(client, max_tokens=51)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "max_tokens")
    assert client.post(PATH, content=b"{").status_code == 400
    assert not server.seen
