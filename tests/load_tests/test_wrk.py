"""wrk's report is read right, and what is sent is what a server can parse; a real wrk against a real server counts its answers."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.api.body import parse_body
from load_tests import images, wrk
from load_tests.images import Photo
from load_tests.wrk import Body, WrkError

REPORT = '{"requests": 600, "microseconds": 3000000, "status": 2, "socket": 3, "timeout": 1, "p50": 1500, "p90": 2500, "p99": 9000}'


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Photo:
    monkeypatch.setenv("VITRINE_BENCH_CACHE", str(tmp_path))
    small = Photo("small.jpg", 32, 24, 1_000)
    images.make(small, small.path)
    return small


def test_the_report_is_read_in_seconds_and_milliseconds() -> None:
    load = wrk.parse(f"Running 3s test @ http://127.0.0.1:1/\n{wrk.MARK}{REPORT}\n")
    assert (load.requests, load.seconds, load.errors) == (600, 3.0, 6)
    assert (load.p50, load.p90, load.p99) == (1.5, 2.5, 9.0)
    assert load.rate == pytest.approx(594 / 3)


def test_no_report_is_an_error() -> None:
    with pytest.raises(WrkError, match="no report"):
        wrk.parse("Running 3s test\n")


@pytest.mark.parametrize("form", ["raw", "multipart", "base64"])
def test_every_form_carries_the_photo(photo: Photo, form: wrk.Form) -> None:
    sent = wrk.body(photo, form)
    assert parse_body(sent.data, sent.content_type, max_images=1).images == [photo.path.read_bytes()]


def test_the_inference_protocol_gets_one_image(photo: Photo) -> None:
    (one,) = json.loads(wrk.body(photo, "infer").data)["inputs"]
    assert one["datatype"] == "BYTES"
    assert len(one["data"]) == 1


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """Answers 200, but every fourth time 500, and keeps what it was sent."""
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(500 if len(received) % 4 == 0 else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/", received
        listening.shutdown()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_counts_wrong_answers(server: tuple[str, list[bytes]], tmp_path: Path) -> None:
    url, received = server
    load = wrk.run(url, Body("image/jpeg", b"\xff\xd8 picture"), clients=1, seconds=1, directory=tmp_path)
    assert set(received) == {b"\xff\xd8 picture"}
    assert abs(load.requests - len(received)) <= 1
    assert load.errors == pytest.approx(load.requests / 4, abs=1)
