"""The soak and the overload: what they conclude, and both of them for seconds, on real gateways with small models."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from load_tests import overload, soak
from load_tests.images import PHOTOS, Photo
from load_tests.k6.runner import Distribution, Run
from load_tests.observer import Sample, drift
from tests.chat_repository import add_chat
from tests.detector_repository import add_detector, add_grounder
from tests.dual_repository import add_dual_encoder
from tests.repository import add_entry
from tests.tokenizer_repository import add_tokenizer

RUN = Run(
    seconds=10, requests=1000, dropped=0, within=1.0, expected=1.0, server_errors=0, latency=Distribution(1000, 5, 6, 7, 8),
    shots={}, stages={}, crossed=(), client_seconds=5, client_wall=10, right=1000,
)  # fmt: skip
BOX = np.array([[0.1, 0.1, 0.6, 0.6]], np.float32)
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
    fine = {"answers": True, "one, memory": True, "one, open files": True, "one, threads": True}
    assert met(soak.judge(RUN, {"one": FLAT})) == fine
    growing = [replace(sample, memory=round(sample.memory * (1 + sample.seconds / 1000))) for sample in FLAT]
    assert met(soak.judge(RUN, {"one": growing})) == fine | {"one, memory": False}
    leaking = [replace(sample, files=40 + round(sample.seconds), threads=20 + round(sample.seconds)) for sample in FLAT]
    assert met(soak.judge(RUN, {"one": FLAT, "two": leaking})) == fine | {
        "two, memory": True,
        "two, open files": False,
        "two, threads": False,
    }
    wrong = soak.judge(replace(RUN, right=999, server_errors=1), {"one": FLAT})["answers"]
    assert wrong == {"told": "1 of 1000 were not what they must be, 1 of them a 5xx", "met": False}


def test_a_soak_too_short_to_tell_a_drift_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"0\.5 minutes are too short"):
        soak.main(minutes=0.5, output=tmp_path)


def test_an_overload_is_judged() -> None:
    before = replace(RUN, seconds=10, requests=1000)  # 100 a second
    half = replace(RUN, seconds=10, requests=2000, right=950, refused=1050, expected=0.475)
    assert all(met(overload.judge(before, half, 0.1, before)).values())
    assert not met(overload.judge(before, replace(half, right=850, refused=1150), 0.1, before))["goodput"]
    assert not met(overload.judge(before, replace(half, refused=1049), 0.1, before))["the rest"], "one got neither"
    assert not met(overload.judge(before, half, 1.5, before))["recovery"]
    assert not met(overload.judge(before, half, 0.1, replace(before, right=800)))["recovery"]
    assert not met(overload.judge(before, replace(half, dropped=40), 0.1, before))["the rest"], "so it was less than twice"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model of every task; photos that are quickly made."""
    monkeypatch.setenv("VITRINE_BENCH_CACHE", str(tmp_path / "cache"))
    for name in ("12mp", "1920x1281"):
        monkeypatch.setitem(PHOTOS, name, Photo(PHOTOS[name].file, 600, 400, 60_000))
    models = tmp_path / "repository"
    add_entry(models, delay=200)
    add_tokenizer(models)
    add_dual_encoder(models)
    add_detector(models, BOX, [0.9], [0])
    add_detector(models, BOX, [0.9], [0], name="seeker", phrases=2)
    add_grounder(models, BOX)
    add_chat(models)
    return models


def test_a_soak_asks_every_task_and_keeps_what_it_saw(repository: Path, tmp_path: Path) -> None:
    with suppress(typer.Exit):  # so short a run may find that memory grows
        soak.main(minutes=0.07, backend="onnxruntime", clients=2, step=0.25, repository=repository, output=tmp_path)
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["verdicts"]["answers"]["met"], found["verdicts"]["answers"]
    assert len(found["shots"]) == 2 * 20
    assert {"onnxruntime greys reconstruct", "onnxruntime truncated JPEG"} <= set(found["shots"])
    assert all(found["run"]["shots"][name]["count"] > 0 for name in found["shots"])
    samples = found["samples"]["onnxruntime"]
    assert len(samples) > 8
    assert min(min(sample["memory"], sample["files"], sample["threads"]) for sample in samples) > 0
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_an_overload_is_answered_or_told_to_come_again(repository: Path, tmp_path: Path) -> None:
    with suppress(typer.Exit):  # on a machine that does other things the goodput may be low
        overload.main(factor=4, seconds=4, photo="500x334", repository=repository, output=tmp_path)
    found = json.loads((tmp_path / "overload-onnxruntime.json").read_text())
    run = found["runs"]["overload"]
    assert found["verdicts"]["the rest"]["met"], found["verdicts"]["the rest"]
    assert run["right"] > 0
    assert run["right"] + run["refused"] == run["requests"]
    assert found["runs"]["after"]["expected"] == 1
