"""The gateway as a process: started by its command, spoken to by curl and raw sockets, stopped by signals."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from app.client import Client
from tests.factories import encode
from tests.gateway import READY_SECONDS, VITRINE, environment, free_port
from tests.gateway import gateway as started
from tests.repository import add_entry

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")


def wait_until_ready(url: str, process: "subprocess.Popen[str]") -> None:
    with Client(url, timeout=5) as client:
        until = time.monotonic() + READY_SECONDS
        while not client.ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)


def serve(folder: Path, **settings: object) -> "tuple[subprocess.Popen[str], str]":
    """A gateway on `folder/repository`, ready; whoever calls ends it."""
    port = free_port()
    variables = environment(repository=folder / "repository", default_classify="colours", port=port, **settings)
    command = [str(VITRINE), "serve"]
    process = subprocess.Popen(command, env=variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until_ready(f"http://127.0.0.1:{port}", process)
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    add_entry(tmp_path / "repository")
    add_entry(tmp_path / "repository", "slow", delay=1200)
    process, url = serve(tmp_path)
    try:
        yield url, process
    finally:
        process.kill()
        process.communicate()


def curl(*arguments: str) -> dict:
    done = subprocess.run(["curl", "-sS", "--max-time", "20", *arguments], capture_output=True, check=True)
    return json.loads(done.stdout)


def test_curl(gateway, tmp_path: Path) -> None:
    url, _ = gateway
    photo = tmp_path / "photo.png"
    photo.write_bytes(RED)
    raw = curl("--data-binary", f"@{photo}", f"{url}/v1/classify")
    form = curl("-F", f"image=@{photo}", "-F", f"image=@{photo}", "-F", "top_k=1", f"{url}/v1/classify")
    expecting = curl("-H", "Expect: 100-continue", "--data-binary", f"@{photo}", f"{url}/v1/classify")
    for answer in (raw, form, expecting):
        assert answer["results"][-1]["predictions"][0]["label"] == "red"
    assert raw["warnings"] == []


def test_many_clients_each_get_their_own_answer(gateway) -> None:
    url, _ = gateway
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "yellow": (200, 200, 0)}
    images = {label: encode(Image.new("RGB", (30, 30), colour), "PNG") for label, colour in colours.items()}
    with httpx2.Client(base_url=url) as client, ThreadPoolExecutor(16) as pool:

        def ask(label: str) -> bool:
            answer = client.post("/v1/classify", content=images[label]).json()
            return answer["results"][0]["predictions"][0]["label"] == label

        assert all(pool.map(ask, list(images) * 50))


def test_an_error_leaves_the_connection_usable(gateway) -> None:
    url, _ = gateway
    with httpx2.Client(base_url=url) as client:
        for content, status in ((b"x", 415), (RED, 200), (RED[:60], 422), (RED, 200), (b"", 400), (RED, 200)):
            assert client.post("/v1/classify", content=content).status_code == status


def test_a_client_that_hangs_up_harms_nobody(gateway) -> None:
    url, process = gateway
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/classify?model=slow HTTP/1.1\r\nHost: x\r\nContent-Length: {len(RED)}\r\n\r\n".encode()
    for body in (b"", RED[:20], RED):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            time.sleep(0.05)
    assert httpx2.post(f"{url}/v1/classify", content=RED).status_code == 200
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert "Traceback" not in output


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_with_requests_in_flight(gateway, stop: signal.Signals) -> None:
    url, process = gateway
    with httpx2.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(4) as pool:
        client.post("/v1/classify?model=slow", content=RED)
        answers = [pool.submit(client.post, "/v1/classify?model=slow", content=RED) for _ in range(4)]
        while "vitrine_requests_in_flight 4.0" not in client.get("/metrics").text:
            assert not all(answer.done() for answer in answers), "the model is too quick for this test"
        process.send_signal(stop)
        while client.get("/readyz").status_code == 200:
            assert not all(answer.done() for answer in answers)
        assert "the server is shutting down" in client.get("/readyz").json()["reasons"]
        assert client.get("/livez").status_code == 200
        late = [client.post("/v1/classify", content=RED), httpx2.post(f"{url}/v1/classify", content=RED)]
        assert [(answer.status_code, answer.json()["code"]) for answer in late] == [(503, "shutting_down")] * 2
        assert {(answer.headers["Retry-After"], answer.headers["Connection"]) for answer in late} == {("1", "close")}
        assert [answer.result().status_code for answer in answers] == [200] * 4
    output, _ = process.communicate(timeout=20)
    assert "Traceback" not in output
    assert process.returncode == 0


def test_requests_that_take_too_long_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """And before that it serves a while, no longer ready, for balancers to notice."""
    add_entry(tmp_path / "repository")
    process, url = serve(tmp_path, shutdown_delay=1, shutdown_timeout=0.5, client_grace=60)
    try:
        host, port = url.removeprefix("http://").split(":")
        with httpx2.Client(base_url=url) as client, socket.create_connection((host, int(port)), timeout=20) as stalled:
            stalled.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            while "vitrine_requests_in_flight 1.0" not in client.get("/metrics").text:
                pass
            process.terminate()
            while client.get("/readyz").status_code == 200:
                pass
            assert client.post("/v1/classify", content=RED).status_code == 200
            process.communicate(timeout=10)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_body_that_never_comes_gives_its_place_back(tmp_path: Path) -> None:
    with started(add_entry(tmp_path / "repository").path.parents[1], max_requests=1, request_timeout=0.5) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as stalled:
            stalled.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            assert b" 504 " in stalled.recv(1000)
        assert httpx2.post(f"{url}/v1/classify", content=RED).status_code == 200
