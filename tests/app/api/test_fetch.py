"""Images by address: off by default, public addresses only, everything bounded. A real HTTP server on the loopback."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.api.fetch import FetchPolicy, fetch
from app.errors import InputError, InvalidValueError, TooLargeError
from tests.factories import make_png

pytestmark = pytest.mark.anyio

LOCAL = FetchPolicy(allowed=True, hosts=("127.0.0.1", "localhost"), timeout=2, max_bytes=100_000)


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(1)
        status = {"/moved": 302, "/gone": 404}.get(self.path, 200)
        body = b"x" * 200_000 if self.path == "/large" else make_png() + (self.headers["Host"] or "").encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/photo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        pass


@pytest.fixture
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_off_unless_allowed(site: str) -> None:
    refusal = await fetch(f"{site}/photo", FetchPolicy())
    assert isinstance(refusal, InvalidValueError)
    assert "VITRINE_ALLOW_URLS" in refusal.detail


async def test_a_listed_host_is_fetched_under_its_own_name(site: str) -> None:
    content = await fetch(f"{site}/photo", LOCAL)
    assert isinstance(content, bytes)
    assert content == make_png() + site.removeprefix("http://").encode()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://localhost:1/",
        "http://[::1]:1/",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://0.0.0.0:1/",
        "http://[::ffff:127.0.0.1]:1/",
        "http://2130706433/",
    ],
)
async def test_addresses_that_are_not_public_are_refused(url: str) -> None:
    refusal = await fetch(url, FetchPolicy(allowed=True, timeout=2))
    assert isinstance(refusal, InvalidValueError)
    assert "not public" in refusal.detail


async def test_hosts_off_the_list_are_refused(site: str) -> None:
    refusal = await fetch(f"{site}/photo", FetchPolicy(allowed=True, hosts=("images.example",)))
    assert isinstance(refusal, InvalidValueError)
    assert "images.example" in refusal.detail


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://", "http://user:word@localhost/", "gopher://localhost/", "http://[::1", "http://a:99999/"]
)
async def test_other_urls_are_refused(url: str) -> None:
    assert isinstance(await fetch(url, LOCAL), InputError)


@pytest.mark.parametrize(("path", "reason"), [("/moved", "redirects"), ("/gone", "404")])
async def test_redirects_and_failures(site: str, path: str, reason: str) -> None:
    refusal = await fetch(site + path, LOCAL)
    assert isinstance(refusal, InvalidValueError)
    assert reason in refusal.detail


async def test_size_and_time_are_bounded(site: str) -> None:
    assert isinstance(await fetch(f"{site}/large", LOCAL), TooLargeError)
    started = time.monotonic()
    refusal = await fetch(f"{site}/slow", FetchPolicy(allowed=True, hosts=("localhost",), timeout=0.2))
    assert isinstance(refusal, InvalidValueError)
    assert time.monotonic() - started < 0.9
