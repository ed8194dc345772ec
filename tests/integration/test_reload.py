"""Versions that come and go under load, with several workers: no request fails, and what is broken is only told of."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from tests.factories import encode
from tests.gateway import gateway
from tests.repository import NAME, add_entry, make_repository

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
WAIT = 30
SEVERAL = 16  # answers in a row, on connections of their own: of both workers


def publish(repository: Path, version: int, *, sound: bool = True) -> None:
    """As an export does it: finished elsewhere, there by one rename. One that is not sound fails its smoke test only."""
    staging = repository.parent / "staging"
    built = add_entry(staging, NAME, version).path
    if not sound:
        np.savez(built / "golden" / "0.npz", probabilities=np.full((1, 6), 1 / 6, np.float32))
    built.rename(repository / NAME / str(version))
    shutil.rmtree(staging)


@contextmanager
def asking(url: str) -> Iterator[list[tuple[int, int]]]:
    """Requests one after the other, each on a new connection; (status, version) of all so far."""
    answers: list[tuple[int, int]] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answer = httpx2.post(f"{url}/v1/classify", content=RED, timeout=WAIT)
            answers.append((answer.status_code, answer.json().get("version", 0)))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def until(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def only(version: int, answers: list[tuple[int, int]]) -> None:
    """Wait until this version alone has answered for a while."""
    until(lambda: len(answers) > SEVERAL and {number for _, number in answers[-SEVERAL:]} == {version})


def told(url: str) -> set[tuple[str, int, tuple[str, ...]]]:
    """Status, version and problems of the model, as every worker lists it."""
    rows = [httpx2.get(f"{url}/v1/models", timeout=WAIT).json()["data"][0] for _ in range(SEVERAL)]
    return {(row["status"], row["version"], tuple(row["problems"])) for row in rows}


def faults(url: str) -> str:
    metrics = httpx2.get(f"{url}/metrics", timeout=WAIT).text
    return next(line.rpartition(" ")[2] for line in metrics.splitlines() if line.startswith("vitrine_model_faults{"))


def test_versions_come_and_go_without_a_failed_request(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    settings = {"default_classify": NAME, "workers": 2, "repository_poll": 0.1, "request_timeout": 2}
    with gateway(repository, **settings) as url, asking(url) as answers:
        only(1, answers)
        publish(repository, 2)
        only(2, answers)
        publish(repository, 3, sound=False)
        until(lambda: float(faults(url)) == 1)
        until(lambda: all(problems for _, _, problems in told(url)))
        ((status, version, (problem,)),) = told(url)
        assert (status, version) == ("ready", 2)
        assert problem.startswith("version 3: ")
        assert "does not reproduce" in problem
        assert f"{NAME}@3 cannot serve: " in (tmp_path / "gateway.log").read_text()
        only(2, answers)
        (repository / NAME / "3").rename(tmp_path / "withdrawn")
        until(lambda: float(faults(url)) == 0)
        publish(repository, 4)
        only(4, answers)
        (repository / NAME / "4").rename(tmp_path / "withdrawn4")  # back to the one before
        only(2, answers)
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {1, 2, 4}
