"""A gateway under load whose real Triton is killed, hangs or loses its model: every request is answered in time, and rightly."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
import pytest
from PIL import Image
from tritonclient.grpc import InferenceServerClient

from app.local_triton import LocalTriton
from tests import triton
from tests.factories import encode
from tests.gateway import gateway
from tests.repository import NAME, add_entry

pytestmark = pytest.mark.triton

COLOURS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
IMAGES = {label: encode(Image.new("RGB", (40, 30), colour), "PNG") for label, colour in COLOURS.items()}
LINGER = 1_000_000  # microseconds that a call waits in Triton for others to share its batch
TIME = 1.0  # of a request, in seconds
LATE = 1.0  # what this machine may add to it
RECOVERY = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    repository = tmp_path_factory.mktemp("faults") / "repository"
    add_entry(repository)
    add_entry(repository, "patient", linger=LINGER)
    with triton.serve(repository) as server:
        yield server


@pytest.fixture(scope="module")
def url(server: LocalTriton) -> Iterator[str]:
    with gateway(server.repository, backend="triton", triton_url=server.url, default_classify=NAME) as url:
        yield url


class Load:
    """Requests one after the other from a few threads: what each came to, when it was sent and what it took."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[float, float, int, bool]] = []
        self._url = url
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(label,)) for label in IMAGES]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, label: str) -> None:
        with httpx2.Client(base_url=self._url, timeout=30, headers={"X-Request-Timeout": str(TIME)}) as client:
            while not self._enough.is_set():
                began = time.monotonic()
                answer = client.post("/v1/classify", content=IMAGES[label])
                right = answer.status_code != 200 or answer.json()["results"][0]["predictions"][0]["label"] == label
                self.answers.append((began, time.monotonic() - began, answer.status_code, right))
                time.sleep(0.01)

    def until(self, condition: Callable[[int], bool], since: float, seconds: float) -> float:
        """When the first request sent after `since` was answered with such a status; it must come within `seconds`."""
        while True:
            found = [began for began, _, status, _ in tuple(self.answers) if began > since and condition(status)]
            if found:
                return found[0]
            assert time.monotonic() < since + seconds, self.answers[-10:]
            time.sleep(0.01)


def kill(server: LocalTriton) -> None:
    assert server.process is not None
    server.process.kill()
    server.stop()


def restart(server: LocalTriton) -> None:
    server.start()
    server.wait_ready()


def hang(server: LocalTriton) -> None:
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP)


def go_on(server: LocalTriton) -> None:
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGCONT)


@contextmanager
def slowed(server: LocalTriton) -> Iterator[None]:
    """It runs for 50 of every 300 milliseconds."""
    enough = threading.Event()

    def slow() -> None:
        while not enough.is_set():
            hang(server)
            time.sleep(0.25)
            go_on(server)
            time.sleep(0.05)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def unload(server: LocalTriton) -> None:
    _control(server, "unload_model")


def load(server: LocalTriton) -> None:
    _control(server, "load_model")


def _control(server: LocalTriton, what: str) -> None:
    client: Any = InferenceServerClient(server.url, channel_args=[("grpc.enable_http_proxy", 0)])
    getattr(client, what)(NAME)
    client.close()


def test_what_a_client_leaves_is_taken_out_of_tritons_queue(server: LocalTriton, url: str) -> None:
    """Its call is cancelled: Triton had it, and never computes it."""
    image, path = IMAGES["red"], "/v1/classify?model=patient"
    assert httpx2.post(url + path, content=image, timeout=30).status_code == 200
    before = computed(server, "patient")
    host, port = url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n".encode() + image)
            time.sleep(0.15)
    assert httpx2.post(url + path, content=image, timeout=30).status_code == 200
    time.sleep(0.3)  # it counts after it has answered
    assert computed(server, "patient") == before + 1


def computed(server: LocalTriton, model: str) -> int:
    """Images that the model has been run on, by Triton's own count."""
    client: Any = InferenceServerClient(server.url, channel_args=[("grpc.enable_http_proxy", 0)])
    statistics = client.get_inference_statistics(model, "1").model_stats[0]
    client.close()
    return int(statistics.inference_count)


@pytest.mark.parametrize(("begin", "end"), [(kill, restart), (hang, go_on), (unload, load)], ids=["killed", "hung", "unloaded"])
def test_every_request_is_answered_in_time_and_it_recovers(
    server: LocalTriton, url: str, begin: Callable[[LocalTriton], None], end: Callable[[LocalTriton], None], tmp_path: Path
) -> None:
    with Load(url) as load:
        load.until(lambda status: status == 200, time.monotonic(), 10)
        begin(server)
        load.until(lambda status: status in (503, 504), time.monotonic(), 10)
        time.sleep(2)
        end(server)
        returned = time.monotonic()
        well = load.until(lambda status: status == 200, returned, RECOVERY)
        time.sleep(0.5)
    assert {status for _, _, status, _ in load.answers} <= {200, 503, 504}
    assert all(right for _, _, _, right in load.answers)
    assert max(seconds for _, seconds, _, _ in load.answers) < TIME + LATE
    assert {status for began, _, status, _ in load.answers if began > well + 0.2} == {200}, "for good"


def test_a_slow_triton_is_waited_for_up_to_the_deadline(server: LocalTriton, url: str) -> None:
    with Load(url) as load:
        load.until(lambda status: status == 200, time.monotonic(), 10)
        time.sleep(1)
        began = time.monotonic()
        with slowed(server):
            time.sleep(4)
        over = time.monotonic()
        load.until(lambda status: status == 200, over, RECOVERY)
        time.sleep(0.5)
    before, during = ([answer for answer in load.answers if (answer[0] > began) == late] for late in (False, True))
    during = [answer for answer in during if answer[0] + answer[1] < over]
    assert fmean(seconds for _, seconds, _, _ in during) > 3 * fmean(seconds for _, seconds, _, _ in before), "it was slow"
    assert sum(status == 200 for _, _, status, _ in during) >= 10
    assert {status for _, _, status, _ in load.answers} <= {200, 503, 504}
    assert all(right for _, _, _, right in load.answers)
    assert max(seconds for _, seconds, _, _ in load.answers) < TIME + LATE
