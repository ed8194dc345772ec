"""Clients that are slow, silent or too many, against a gateway as a process: each is got rid of, and nobody else notices."""

import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

import httpx2
import pytest
from PIL import Image

from app.connections import _allow_files
from tests.factories import encode
from tests.gateway import gateway
from tests.repository import make_repository

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sockets of POSIX")

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
SLOW = 1000
PLACES = 8
GRACE = 1.5
MOST = 1100


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Few places, little patience."""
    repository = make_repository(tmp_path_factory.mktemp("gateway") / "repository")
    settings = {"backend": "fake", "client_grace": GRACE, "max_connections": MOST, "max_body_bytes": 1_000_000}
    with gateway(repository, max_requests=PLACES, **settings) as address:
        yield address


def connect(url: str, receive: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other side has ended."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def status(connection: socket.socket) -> int:
    return int(everything(connection).split(b" ", 2)[1])


def head(*lines: str, method: str = "POST", path: str = "/v1/classify") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *lines, "", "")).encode()


def drip(connections: list[socket.socket]) -> list[int]:
    """Send a byte per second on each until all have their answers; gives the statuses."""
    for connection in connections:
        connection.sendall(head("Content-Length: 100000"))
    with DefaultSelector() as waiting:
        for connection in connections:
            waiting.register(connection, EVENT_READ)
        statuses = []
        while waiting.get_map():
            for connection in [key.fileobj for key in waiting.get_map().values()]:
                connection.sendall(b"x")
            second = time.monotonic() + 1
            while (left := second - time.monotonic()) > 0 and waiting.get_map():
                for key, _ in waiting.select(left):
                    statuses.append(status(key.fileobj))
                    waiting.unregister(key.fileobj)
    return statuses


def test_a_thousand_slow_uploads_hold_nobody_up(url: str) -> None:
    assert _allow_files(SLOW + 200) >= SLOW + 200
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool, httpx2.Client(base_url=url, timeout=20) as client:
        slow = pool.submit(drip, [stack.enter_context(connect(url)) for _ in range(SLOW)])
        good = []
        while not slow.done():
            started = time.monotonic()
            answer = client.post("/v1/classify", content=RED)
            good.append((answer.status_code, time.monotonic() - started))
            time.sleep(0.02)
        assert {code for code, _ in good} == {200}, "not one was refused, though the slow ones are more than all places"
        assert len(good) > 10
        assert slow.result() == [408] * SLOW


def test_a_body_that_keeps_the_pace_is_taken(url: str) -> None:
    """Longer than the grace, but more than the rate."""
    body = RED + bytes(40_000)
    with connect(url) as connection:
        connection.sendall(head(f"Content-Length: {len(body)}", "Connection: close"))
        started = time.monotonic()
        for start in range(0, len(body), 5000):
            connection.sendall(body[start : start + 5000])
            time.sleep(0.25)
        assert time.monotonic() - started > GRACE
        assert status(connection) == 200


@pytest.mark.parametrize("begun", [b"", b"POST /v1/cla", head("X-Long: a")[:-4]], ids=["nothing", "line", "headers"])
def test_a_request_that_never_begins_ends(url: str, begun: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(begun)
        started = time.monotonic()
        answer = everything(connection)
        assert GRACE < time.monotonic() - started < GRACE + 3
    assert answer.startswith(b"HTTP/1.1 408 ") if begun else answer == b""


def test_headers_that_trickle_are_no_way_out(url: str) -> None:
    with connect(url) as connection:
        started = time.monotonic()
        connection.settimeout(0.2)
        connection.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        while time.monotonic() < started + 10:
            connection.sendall(b"a")
            try:
                answer = connection.recv(1000)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("headers", [b"X-Long: " + b"a" * 8_000_000, b"X-Many: a\r\n" * 800_000], ids=["long", "many"])
def test_headers_that_never_end_are_not_kept(url: str, headers: bytes) -> None:
    """A request in one piece of the network may have more; what is bounded is memory."""
    with connect(url) as connection:
        started = time.monotonic()
        with suppress(OSError):
            connection.sendall(b"GET /livez HTTP/1.1\r\n" + headers)
        assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")
        assert time.monotonic() - started < GRACE
    with connect(url) as connection:
        connection.sendall(head("X-Long: " + "a" * 60_000, "Connection: close", method="GET", path="/livez"))
        assert status(connection) == 200


def test_an_answer_that_nobody_takes_ends(url: str) -> None:
    path = "/docs/assets/swagger-ui-bundle.js"
    whole = len(httpx2.get(url + path).content)
    with connect(url, receive=4096) as connection:
        connection.sendall(head(method="GET", path=path) * 8)
        time.sleep(GRACE + 2)
        taken = 0
        try:
            while chunk := connection.recv(65536):
                taken += len(chunk)
        except ConnectionResetError:
            pass
    assert taken < 8 * whole, "cut off, not kept for ever"
    assert httpx2.post(f"{url}/v1/classify", content=RED).status_code == 200


@pytest.mark.parametrize("wish", ["close", "keep-alive"])
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/nothing"])
def test_an_early_answer_arrives_under_a_body_that_nobody_reads(url: str, wish: str, path: str) -> None:
    """413 from the announced length, and 404, are said at once; the client only looks after it has sent everything."""
    body = bytes(8_000_000)
    with connect(url) as connection:
        connection.sendall(head(f"Content-Length: {len(body)}", f"Connection: {wish}", path=path))
        time.sleep(0.2)
        connection.sendall(body)
        expected = b" 413 " if path == "/v1/classify" else b" 404 "
        assert expected in connection.recv(65536)


def test_a_client_that_expects_100_sends_nothing_in_vain(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(head("Content-Length: 8000000", "Expect: 100-continue", "Connection: close"))
        assert everything(connection).startswith(b"HTTP/1.1 413 ")
    with connect(url) as connection:
        connection.sendall(head(f"Content-Length: {len(RED)}", "Expect: 100-continue", "Connection: close"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(RED)
        assert status(connection) == 200


def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    with gateway(repository, backend="fake", max_connections=10) as url, ExitStack() as stack:
        held = [stack.enter_context(connect(url)) for _ in range(10)]
        time.sleep(0.2)
        with connect(url) as surplus:
            surplus.sendall(head(f"Content-Length: {len(RED)}") + RED)
            answer = everything(surplus)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        for connection in held:
            connection.close()
        time.sleep(0.2)
        assert httpx2.post(f"{url}/v1/classify", content=RED).status_code == 200


def test_a_new_connection_takes_over_from_the_one_that_has_been_idle_the_longest(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    with gateway(repository, backend="fake", max_connections=3) as url, ExitStack() as stack:
        held = [stack.enter_context(connect(url)) for _ in range(3)]
        for connection in held:
            connection.sendall(head(method="GET", path="/livez"))
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.01)
        with connect(url) as surplus:
            surplus.sendall(head(f"Content-Length: {len(RED)}", "Connection: close") + RED)
            assert status(surplus) == 200
        assert everything(held[0]) == b""
        held[1].sendall(head("Connection: close", method="GET", path="/livez"))
        assert status(held[1]) == 200


def test_a_connection_is_idle_once_the_rest_of_a_refused_body_has_come(url: str) -> None:
    with connect(url) as connection:
        body = b"x" * 900_000
        connection.sendall(head(f"Content-Length: {len(body)}", "Content-Encoding: gzip") + body[:1000])
        assert connection.recv(4096).startswith(b"HTTP/1.1 415 ")
        connection.sendall(body[1000:])
        time.sleep(GRACE + 1)
        connection.sendall(head(f"Content-Length: {len(RED)}", "Connection: close") + RED)
        assert status(connection) == 200


def test_headers_in_pieces_have_their_time_behind_a_long_pause(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(head(method="GET", path="/livez"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        time.sleep(GRACE + 1)
        request = head(f"Content-Length: {len(RED)}", "Connection: close") + RED
        connection.sendall(request[:20])
        time.sleep(GRACE / 2)
        connection.sendall(request[20:])
        assert status(connection) == 200
