"""Several processes as people start them: one ready line, sums in the metrics, the dead replaced, signals that end all of it."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.settings import Settings
from app.workers import bind, share
from tests.factories import encode
from tests.gateway import VITRINE, environment, free_port
from tests.repository import add_entry, make_repository

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
WAIT = 30


class Gateway:
    """`vitrine serve --workers N` with its log as JSON in a file, and no connection kept alive between requests."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def started(self) -> list[int]:
        """The processes of all workers so far, in the order of their start."""
        found = [record["message"].split() for record in self.records() if record["logger"] == "vitrine.workers"]
        return [int(words[1]) for words in found if words[2:] == ["started"]]

    def ask(self, path: str = "/v1/classify") -> httpx2.Response:
        with httpx2.Client(base_url=self.url, timeout=WAIT) as client:
            return client.post(path, content=RED)

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples `name` of /metrics by the values of their labels, in the order of the labels' names."""
        families = text_string_to_metric_families(httpx2.get(f"{self.url}/metrics", timeout=WAIT).text)
        found = [sample for family in families for sample in family.samples if sample.name == name]
        assert len(found) == len({tuple(sorted(sample.labels.items())) for sample in found}), "one sample per set of labels"
        return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in found}

    def ready_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def serving(repository: Path, *, workers: int = 2, port: int | None = None, **variables: object) -> Iterator[Gateway]:
    port = port or free_port()
    log = repository.parent / "gateway.log"
    given = {"repository": repository, "default_classify": "colours", "port": port, "log_format": "json"} | variables
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [VITRINE, "serve", "--workers", str(workers)],
            env=environment(**given),
            cwd=repository.parent,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield Gateway(process, port, log)
    finally:
        process.terminate()
        process.communicate(timeout=WAIT)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


def until(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_every_worker_gives_the_sum_of_all(repository: Path) -> None:
    with serving(repository) as gateway:
        assert f"answers on {gateway.url} (onnxruntime" in gateway.ready_line()
        assert len(gateway.started()) == 2
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda _: gateway.ask().status_code, range(50)))
        assert statuses == [200] * 50
        answered = [gateway.samples("vitrine_request_seconds_count")["200", "colours", "classify"] for _ in range(12)]
        assert answered == [50] * 12, "whichever worker answers"
        assert gateway.samples("vitrine_images_total")["colours", "classify"] == 50
        assert gateway.samples("vitrine_stage_seconds_count")["colours", "infer", "classify"] == 50
        assert gateway.samples("vitrine_requests_in_flight") == {(): 0}
        assert gateway.samples("vitrine_model_info") == {("onnxruntime", "colours", "fp32", "1"): 1}
        assert gateway.samples("vitrine_backend_up") == {("onnxruntime",): 1}
        assert gateway.samples("vitrine_rejected_total")["requests",] == 0
        directory = Path(environment_of(gateway.started()[0])["PROMETHEUS_MULTIPROC_DIR"])
        took_part = {path.stem.rpartition("_")[2] for path in directory.glob("counter_*.db")}
        assert took_part == {str(pid) for pid in gateway.started()}
        gateway.process.terminate()
        rest, _ = gateway.process.communicate(timeout=WAIT)
    assert "answers on" not in rest, "ready is said once"
    assert not directory.exists()


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_a_killed_worker_is_replaced_and_leaves_no_gauges(repository: Path) -> None:
    add_entry(repository, "slow", delay=1500)
    with serving(repository, instances=2) as gateway, ThreadPoolExecutor(4) as pool:
        gateway.ready_line()
        assert gateway.ask("/v1/classify?model=slow").status_code == 200
        doomed, other = gateway.started()
        lost = [pool.submit(gateway.ask, "/v1/classify?model=slow") for _ in range(4)]
        until(lambda: gateway.samples("vitrine_requests_in_flight")[()] > 0)
        os.kill(doomed, signal.SIGKILL)
        os.kill(other, signal.SIGKILL)
        until(lambda: len(gateway.started()) == 4)
        for answer in lost:
            assert answer.exception() is None or isinstance(answer.exception(), httpx2.TransportError)
        assert [gateway.ask().status_code for _ in range(8)] == [200] * 8
        assert not alive(doomed)
        assert gateway.samples("vitrine_requests_in_flight") == {(): 0}
        assert set(gateway.samples("vitrine_queue_depth").values()) == {0}
        assert gateway.samples("vitrine_request_seconds_count")["200", "slow", "classify"] >= 1, "what the dead counted stays"
        died = [record for record in gateway.records() if "exit code -9" in record["message"]]
        assert {record["level"] for record in died} == {"ERROR"}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_with_requests_in_flight(repository: Path, stop: signal.Signals) -> None:
    add_entry(repository, "slow", delay=1000)
    with serving(repository) as gateway, ThreadPoolExecutor(4) as pool, ThreadPoolExecutor(8) as newcomers:
        gateway.ready_line()
        for _ in range(2):
            gateway.ask("/v1/classify?model=slow")
        answers = [pool.submit(gateway.ask, "/v1/classify?model=slow") for _ in range(4)]
        until(lambda: gateway.samples("vitrine_requests_in_flight")[()] == 4)
        workers = gateway.started()
        gateway.process.send_signal(stop)
        asked = []
        while not all(answer.done() for answer in answers):
            asked.append(newcomers.submit(gateway.ask))
            time.sleep(0.05)
        assert [answer.result().status_code for answer in answers] == [200] * 4
        late = []
        for newcomer in asked:
            with suppress(httpx2.TransportError):  # when the last one has ended
                late.append(newcomer.result().status_code)
        assert 503 in late
        assert late[late.index(503) :] == [503] * late.count(503), "once it ends, nobody is let in any more"
        gateway.process.communicate(timeout=WAIT)
        assert gateway.process.returncode == 0
        assert not any(map(alive, workers))
    assert "Traceback" not in gateway.log.read_text()


def test_workers_do_not_outlive_their_parent(repository: Path) -> None:
    with serving(repository) as gateway:
        gateway.ready_line()
        workers = gateway.started()
        gateway.process.kill()
        gateway.process.wait(WAIT)
        until(lambda: not any(map(alive, workers)))


def test_a_port_that_is_taken_ends_it(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, serving(repository, port=taken.getsockname()[1]) as gateway:
        gateway.process.communicate(timeout=WAIT)
        assert gateway.process.returncode == 1
        assert "ddress already in use" in gateway.log.read_text()


def test_a_gateway_of_several_does_not_take_the_port_of_another() -> None:
    first = bind("127.0.0.1", 0, 2)
    try:
        assert len({listener.getsockname() for listener in first}) == 1
        first[0].listen()
        with pytest.raises(OSError, match="in use"):
            bind(*first[0].getsockname(), 2)
    finally:
        for listener in first:
            listener.close()


def test_workers_that_cannot_start_end_it(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails at the first start fails at every start."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/onnxruntime.py").write_text("raise ImportError('cannot be loaded here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with serving(repository) as gateway:
        gateway.process.communicate(timeout=WAIT)
        assert gateway.process.returncode == 1
        assert "cannot be loaded here" in gateway.log.read_text()
        assert len(gateway.started()) == 2


@pytest.mark.parametrize(("workers", "part"), [(1, 1), (2, 2), (3, 3), (1000, 1000)])
def test_limits_are_shared_out(workers: int, part: int) -> None:
    settings = Settings(
        _env_file=None,
        workers=workers,
        max_requests=100,
        max_queue=99,
        instances=4,
        compute_threads=3,
        triton_concurrency=64,
        chat_streams=4,
        chat_queue=16,
        models={"large": {"instances": 4, "threads": 2}},
    )
    each = share(settings)
    assert each.max_requests == max(1, 100 // part)
    assert each.max_queue == max(1, 99 // part)
    assert each.instances == max(1, 4 // part)
    assert (each.models["large"].instances, each.models["large"].threads) == (max(1, 4 // part), 2)
    assert each.compute_threads == max(1, 3 // part)
    assert each.triton_concurrency == max(1, 64 // part)
    assert (each.chat_streams, each.chat_queue) == (max(1, 4 // part), max(1, 16 // part))
    assert each.max_body_bytes_in_flight == max(each.max_body_bytes, settings.max_body_bytes_in_flight // part)
    assert each.max_pixels_in_flight == max(each.max_image_pixels, settings.max_pixels_in_flight // part)
    assert each.max_image_pixels == settings.max_image_pixels


def test_sharing_never_raises_a_limit() -> None:
    settings = Settings(_env_file=None, workers=4, max_body_bytes_in_flight=1000, max_pixels_in_flight=5000)
    each = share(settings)
    assert (each.max_body_bytes_in_flight, each.max_pixels_in_flight) == (1000, 5000)
