"""The k6 scenarios: the search on simulated queues, and real runs against a real gateway."""

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from app.metrics import STAGES
from load_tests.k6.runner import Plan, read_summary, run
from load_tests.k6.search import Search
from load_tests.k6.shots import Shot, faults, shot
from tests.factories import make_jpeg
from tests.gateway import gateway
from tests.repository import make_repository

ROOT = Path(__file__).parents[2]


def queue(service: float, seed: int, hiccups: float = 0.0) -> Callable[[float], float]:
    """The share of 4,000 Poisson arrivals that one server, `service` seconds each, answers within 50 ms; sometimes it hangs."""
    chance = random.Random(seed)

    def measure(rate: float) -> float:
        if chance.random() < hiccups:
            return 0.9
        now = free = 0.0
        late = 0
        for _ in range(4000):
            now += chance.expovariate(rate)
            free = max(free, now) + service
            late += free - now > 0.05
        return 1 - late / 4000

    return measure


@pytest.mark.parametrize("capacity", [3.0, 40.0, 137.0, 900.0])
def test_the_search_finds_a_sharp_capacity(capacity: float) -> None:
    search = Search(lambda rate: float(rate <= capacity))
    assert capacity / 1.05 <= (search.run() or 0) <= capacity
    assert search.settled
    assert len(search.steps) <= search.max_steps


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hiccups", [0.0, 0.05])
def test_the_search_finds_what_a_queue_holds(seed: int, hiccups: float) -> None:
    """Constant service of 2 ms: the wait of an M/D/1 queue passes 50 ms for 1 % at a load of about 0.92, 460 a second."""
    repeats = 5 if hiccups else 3
    search = Search(queue(0.002, seed, hiccups), repeats=repeats, max_steps=80)
    assert 400 < (search.run() or 0) < 500
    assert search.settled
    assert all(len(search.shares(rate)) >= repeats for rate in (search.holds, search.fails) if rate)


def test_one_bad_measurement_on_the_way_up_is_overturned() -> None:
    outcomes = iter([1.0, 0.5])
    search = Search(lambda rate: next(outcomes, float(rate <= 400)), max_steps=40)
    assert 380 <= (search.run() or 0) <= 400


def test_a_search_ends() -> None:
    assert Search(lambda rate: 0.0).run() is None
    assert Search(lambda rate: 1.0, ceiling=300).run() == 300
    short = Search(lambda rate: float(rate <= 137), max_steps=4)
    assert short.run() == 100
    assert not short.settled


def test_a_summary_counts_what_was_never_sent_as_late() -> None:
    trend = {"count": 3, "med": 2.0, "p(90)": 3.0, "p(99)": 3.5, "max": 4.0}
    document = {
        "state": {"testRunDurationMs": 2000},
        "metrics": {
            "http_reqs": {"values": {"count": 90, "rate": 45}},
            "dropped_iterations": {"values": {"count": 10}, "thresholds": {"count<=1": {"ok": False}}},
            "within": {"values": {"rate": 1, "passes": 90, "fails": 0}, "thresholds": {"rate>=0.99": {"ok": True}}},
            "expected": {"values": {"rate": 1, "passes": 90, "fails": 0}},
            "latency": {"values": trend},
            "latency{shot:a.jpg}": {"values": trend},
            "stage_infer": {"values": trend},
            "stage_read": {"values": trend | {"count": 0}},
        },
    }
    found = read_summary(document, client=(1.0, 2.5))
    assert (found.requests, found.dropped, found.within, found.rate) == (90, 10, 0.9, 45)
    assert found.crossed == ("dropped_iterations: count<=1",)
    assert found.latency == found.shots["a.jpg"] == found.stages["infer"]
    assert (list(found.shots), list(found.stages)) == (["a.jpg"], ["infer"])
    assert found.client_cores == 0.4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "500x334.jpg").write_bytes(make_jpeg(120, 80))
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway(make_repository(tmp_path_factory.mktemp("k6") / "repository"), default_classify="colours") as url:
        yield f"{url}/v1/classify"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "load_tests.k6", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_closed_loop_passes_and_times_every_stage(url: str, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "results/closed.json"
    ran = command("closed", "--url", url, "--images", images, "--clients", "1,2", "--seconds", 1, "--output", output)
    assert ran.returncode == 0, ran
    assert ran.stdout.count("passed; the client used") == 2
    runs = json.loads(output.read_text())["runs"]
    assert list(runs) == ["1 clients", "2 clients"]
    for measured in runs.values():
        assert measured["requests"] > 10
        assert (measured["expected"], measured["within"], measured["dropped"]) == (1, 1, 0)
        assert tuple(measured["stages"]) == STAGES
        assert {stage["count"] for stage in measured["stages"].values()} == {measured["requests"]}
        assert measured["client_seconds"] > 0


def test_a_crossed_threshold_fails_the_command(url: str, images: Path) -> None:
    ran = command("closed", "--url", f"{url}?model=no-such-model", "--images", images, "--clients", 1, "--seconds", 1)
    assert ran.returncode == 1, ran
    assert "FAILED" in ran.stdout
    assert "500x334.jpg: 404 instead of 200" in ran.stdout
    assert "expected{shot:500x334.jpg}: rate==1" in ran.stdout


def test_every_fault_gets_its_status_and_code(url: str, images: Path) -> None:
    ran = command("faults", "--url", url, "--images", images, "--clients", 2, "--seconds", 1)
    assert ran.returncode == 0, ran
    assert all(fault.name in ran.stdout for fault in faults(url, images / "500x334.jpg"))


def test_another_code_than_the_expected_one_fails(url: str) -> None:
    wrong = Shot("text", url, b"no image", "text/plain", 415, "too_large")
    found = run(Plan([wrong], 1, 1000, clients=1))
    assert found.crossed
    assert "text: 415 unsupported_media instead of 415 too_large" in found.log


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_the_other_forms_of_a_body_are_understood(url: str, images: Path, form: str) -> None:
    found = run(Plan([shot(url, images / "500x334.jpg", form)], 1, 1000, clients=1, stages=False))
    assert found.passed
    assert not found.stages


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps vary as much as their mean and counts in a window as much as theirs, where even spacing gives 0; a busy machine adds."""
    arrivals: list[float] = []

    class Recorder(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            arrivals.append(time.perf_counter())
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing is printed."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    with Server(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = Shot("one", f"http://127.0.0.1:{server.server_port}/", b"x", "text/plain")
        found = run(Plan([target], 3, 100, rate=150, stages=False))
        server.shutdown()
    assert found.expected == 1, found
    assert found.requests == len(arrivals) == pytest.approx(450, abs=90)
    gaps = [later - earlier for earlier, later in pairwise(sorted(arrivals))]
    assert statistics.stdev(gaps) / statistics.mean(gaps) > 0.8
    windows = Counter(int((arrival - min(arrivals)) / 0.05) for arrival in arrivals)
    counts = [windows[window] for window in range(max(windows))]
    assert statistics.variance(counts) / statistics.mean(counts) > 0.6
