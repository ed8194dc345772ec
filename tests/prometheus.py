"""A real Prometheus on the configuration of deploy/prometheus, for the tests that need one."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.gateway import free_port

DEPLOY = Path(__file__).resolve().parent.parent / "deploy/prometheus"
READY_SECONDS = 30
SCRAPE_INTERVAL = "1s"


def require(program: str = "prometheus") -> str:
    """The path of `program`; without it the test is skipped, or fails where VITRINE_REQUIRE says that it must be there."""
    found = shutil.which(program)
    if found is None:
        if "prometheus" in os.environ.get("VITRINE_REQUIRE", "").split(","):
            pytest.fail(f"VITRINE_REQUIRE asks for Prometheus, and there is no {program}; on Debian: apt install prometheus.")
        pytest.skip(f"There is no {program} on the PATH.")
    return found


class Prometheus:
    """Asks a running server."""

    def __init__(self, url: str) -> None:
        self._client = httpx2.Client(base_url=url, timeout=10)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the API; an expression that cannot be evaluated is an error."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series of an instant vector."""
        return [(sample["metric"], float(sample["value"][1])) for sample in self.get("query", query=expression)["result"]]

    def ready(self) -> bool:
        try:
            return bool(self._client.get("/-/ready").status_code == 200)
        except httpx2.TransportError:
            return False

    def wait_for(self, expression: str, seconds: float = READY_SECONDS) -> None:
        """Wait until the expression has a sample."""
        until = time.monotonic() + seconds
        while not self.query(expression):
            assert time.monotonic() < until, expression
            time.sleep(0.1)

    def close(self) -> None:
        self._client.close()


def configuration(targets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml with other targets per job, in a hurry."""
    written = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    written["global"] = dict.fromkeys(written["global"], SCRAPE_INTERVAL)
    written["rule_files"] = [str(DEPLOY / file) for file in written["rule_files"]]
    assert {job["job_name"] for job in written["scrape_configs"]} == set(targets)
    for job in written["scrape_configs"]:
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
    return dict(written)


@contextmanager
def serve(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """A server that scrapes `targets` (host:port, by job), ready inside; its data and its log lie in `folder`."""
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(targets)))
    address = f"127.0.0.1:{free_port()}"
    command = [require(), "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    server = Prometheus(f"http://{address}")
    try:
        until = time.monotonic() + READY_SECONDS
        while not server.ready():
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < until, (folder / "prometheus.log").read_text()
            time.sleep(0.05)
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(30)
