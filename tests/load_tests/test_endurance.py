"""The soak and the overload: what they conclude, and both of them for seconds, on real gateways with small models."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from load_tests import overload, soak
from load_tests.images import PHOTOS, Photo
from load_tests.k6.runner import Distribution, Run
from load_tests.observer import Sample, drift
from tests.repository import add_entry
from tests.tokenizer_repository import add_tokenizer

RUN = Run(
    seconds=10, requests=1000, dropped=0, within=1.0, expected=1.0, server_errors=0, latency=Distribution(1000, 5, 6, 7, 8),
    shots={}, stages={}, crossed=(), client_seconds=5, client_wall=10, right=1000,
)  # fmt: skip
FLAT = [Sample(float(second), 100 * 2**20, 40, 20, float(second)) for second in range(100)]


def met(verdicts: dict[str, dict[str, object]]) -> dict[str, object]:
    return {name: verdict["met"] for name, verdict in verdicts.items()}


def test_a_drift_leaves_out_the_beginning() -> None:
    found = drift([1.0] * 10 + [100.0] * 50 + [103.0] * 40)
    assert (found.first, found.last) == (100, 103)
    assert found.growth == pytest.approx(0.03)
    with pytest.raises(ValueError, match="1 samples say nothing"):
        drift([1.0])


def test_a_soak_is_judged() -> None:
    assert all(met(soak.judge(RUN, FLAT)).values())
    growing = [replace(sample, memory=round(sample.memory * (1 + sample.seconds / 1000))) for sample in FLAT]
    assert met(soak.judge(RUN, growing)) == {"answers": True, "memory": False, "open files": True, "threads": True}
    leaking = [replace(sample, files=40 + round(sample.seconds), threads=20 + round(sample.seconds)) for sample in FLAT]
    assert met(soak.judge(RUN, leaking)) == {"answers": True, "memory": True, "open files": False, "threads": False}
    wrong = soak.judge(replace(RUN, expected=0.999, server_errors=1), FLAT)["answers"]
    assert wrong == {"told": "1 of 1000 were not what they must be, 1 of them a 5xx", "met": False}


def test_an_overload_is_judged() -> None:
    before = replace(RUN, seconds=10, requests=1000)  # 100 a second
    half = replace(RUN, seconds=10, requests=2000, right=950, refused=1050, expected=0.475)
    assert all(met(overload.judge(before, half, 0.1, before)).values())
    assert not met(overload.judge(before, replace(half, right=850, refused=1150), 0.1, before))["goodput"]
    assert not met(overload.judge(before, replace(half, refused=1049), 0.1, before))["the rest"], "one got neither"
    assert not met(overload.judge(before, half, 1.5, before))["recovery"]
    assert not met(overload.judge(before, half, 0.1, replace(before, requests=800)))["recovery"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small models under the names of the bundled ones; photos that are quickly made."""
    monkeypatch.setenv("VITRINE_BENCH_CACHE", str(tmp_path / "cache"))
    for name in ("12mp", "1920x1281"):
        monkeypatch.setitem(PHOTOS, name, Photo(PHOTOS[name].file, 600, 400, 60_000))
    add_entry(tmp_path / "repository", "convnext-50", delay=200)
    add_tokenizer(tmp_path / "repository", "vq-photo")
    return tmp_path / "repository"


def test_a_soak_asks_every_task_and_keeps_what_it_saw(repository: Path, tmp_path: Path) -> None:
    with suppress(typer.Exit):  # so short a run may find that memory grows
        soak.main(minutes=0.07, clients=2, step=0.25, repository=repository, output=tmp_path)
    found = json.loads((tmp_path / "soak-onnxruntime.json").read_text())
    assert found["verdicts"]["answers"]["met"], found["verdicts"]["answers"]
    assert {"tokenize", "detokenize", "reconstruct", "classify, json", "truncated JPEG"} <= set(found["shots"])
    assert all(found["run"]["shots"][name]["count"] > 0 for name in found["shots"])
    assert len(found["samples"]) > 8
    assert min(min(sample["memory"], sample["files"], sample["threads"]) for sample in found["samples"]) > 0
    assert (tmp_path / "soak-onnxruntime.png").read_bytes().startswith(b"\x89PNG")


def test_an_overload_is_answered_or_told_to_come_again(repository: Path, tmp_path: Path) -> None:
    with suppress(typer.Exit):  # on a machine that does other things the goodput may be low
        overload.main(factor=4, seconds=4, photo="500x334", repository=repository, output=tmp_path)
    found = json.loads((tmp_path / "overload-onnxruntime.json").read_text())
    run = found["runs"]["overload"]
    assert found["verdicts"]["the rest"]["met"], found["verdicts"]["the rest"]
    assert run["right"] > 0
    assert run["right"] + run["refused"] == run["requests"]
    assert found["runs"]["after"]["expected"] == 1
