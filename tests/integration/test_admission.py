"""A full gateway, a request's own deadline and clients that leave, with the embedded engine as slow as it takes to see them."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.factories import encode
from tests.gateway import gateway
from tests.repository import add_entry

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
SLOW, OTHER = "/v1/classify?model=slow", "/v1/classify?model=other"
WAIT = 20


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A gateway of three places, with two engines that compute one image at a time and let one more wait."""
    root = tmp_path_factory.mktemp("admission") / "repository"
    add_entry(root)
    for name in ("slow", "other"):
        add_entry(root, name, delay=1800, max_batch=1)
    settings = {"default_classify": "colours", "compute_threads": 2, "instances": 1, "threads": 1}
    with gateway(root, **settings, max_requests=3, max_queue=1) as url, httpx2.Client(base_url=url, timeout=WAIT) as client:
        assert [client.post(path, content=RED).status_code for path in (SLOW, OTHER)] == [200, 200]
        yield client


def sample(client: httpx2.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(
        each.value for family in families for each in family.samples if each.name == name and labels.items() <= each.labels.items()
    )


def computed(client: httpx2.Client) -> float:
    """The calls that the slow engine has computed. It takes one at a time: what ran on unheard has ended with this one."""
    assert client.post(SLOW, content=RED).status_code == 200
    return sample(client, "vitrine_batch_size_sum", engine="slow@1")


@contextmanager
def occupied(client: httpx2.Client, *paths: str) -> Iterator[None]:
    """Requests that have come one after the other and are in flight inside; all of them are answered."""
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = []
        for path in paths:
            answers.append(pool.submit(client.post, path, content=RED))
            end = time.monotonic() + WAIT
            while sample(client, "vitrine_requests_in_flight") < len(answers):
                assert time.monotonic() < end
            time.sleep(0.1)  # to be decoded and to reach the engine
        yield
        assert [answer.result().status_code for answer in answers] == [200] * len(paths)


def test_full_is_said_before_the_body_is_asked_for(client: httpx2.Client) -> None:
    with occupied(client, SLOW, SLOW, OTHER):
        url = client.base_url
        with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n")
            answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 429 "), "and not 100 Continue"
        assert b"retry-after: 1\r\n" in answer.lower()
        refused = client.post("/v1/classify", content=RED)
        assert (refused.status_code, refused.json()["code"]) == (429, "full")
        assert "read" not in refused.headers.get("Server-Timing", "")
    assert client.post("/v1/classify", content=RED).status_code == 200


def test_a_full_queue_is_said_before_anything_is_decoded(client: httpx2.Client) -> None:
    with occupied(client, SLOW, SLOW):
        refused = client.post(SLOW, content=RED)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "decode" not in refused.headers["Server-Timing"]
        assert client.post("/v1/classify", content=RED).status_code == 200, "another engine's queue is empty"


def test_a_request_says_how_long_it_waits(client: httpx2.Client) -> None:
    before = computed(client)
    with occupied(client, SLOW):
        started = time.monotonic()
        late = client.post(SLOW, content=RED, headers={"X-Request-Timeout": "0.05"})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert 0.05 <= time.monotonic() - started < 1
    client.post(SLOW, content=RED)
    assert sample(client, "vitrine_batch_size_sum", engine="slow@1") == before + 2, "what had expired was not computed"


def test_what_is_no_time_is_refused_and_none_is_longer_than_the_servers(client: httpx2.Client) -> None:
    for said in ("soon", "0", "-1", "nan", "inf", ""):
        answer = client.post("/v1/classify", content=RED, headers={"X-Request-Timeout": said})
        assert (answer.status_code, answer.json()["field"]) == (422, "X-Request-Timeout"), said
    assert client.post("/v1/classify", content=RED, headers={"X-Request-Timeout": "1e9"}).status_code == 200


def test_who_leaves_is_not_computed_for(client: httpx2.Client) -> None:
    before = computed(client)
    request = f"POST {SLOW} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(RED)}\r\n\r\n".encode() + RED
    with occupied(client, SLOW):
        url = client.base_url
        for left in range(1, 3):  # more than may wait: who has left takes no room
            with socket.create_connection((url.host, url.port or 80)) as leaving:
                leaving.sendall(request)
                time.sleep(0.1)
            end = time.monotonic() + WAIT
            while sample(client, "vitrine_request_seconds_count", code="499") < left:
                assert time.monotonic() < end
    assert client.post(SLOW, content=RED).status_code == 200
    assert sample(client, "vitrine_batch_size_sum", engine="slow@1") == before + 2
    assert sample(client, "vitrine_requests_in_flight") == 0
