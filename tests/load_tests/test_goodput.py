"""The open-loop comparison: ratios of what was found, and a whole search on a real gateway."""

import json
from pathlib import Path

import pytest
import typer

from load_tests import goodput, models
from load_tests.goodput import compare, main
from load_tests.k6.goodput import Wanted, find
from load_tests.k6.runner import Run
from load_tests.k6.shots import shot
from load_tests.models import MODELS, Model
from load_tests.servers import CONTENDERS
from tests.factories import make_jpeg
from tests.gateway import gateway
from tests.repository import make_repository


def test_ratios_are_of_the_first() -> None:
    assert compare({"vitrine": 300.0, "litserve": 120.0, "fastapi": 100.0}) == {"litserve": 2.5, "fastapi": 3.0}
    assert compare({"vitrine": 300.0, "litserve": None}) == {"litserve": None}
    assert compare({"vitrine": None, "litserve": 120.0}) == {"litserve": None}


def test_a_search_keeps_every_step(tmp_path: Path) -> None:
    (tmp_path / "small.jpg").write_bytes(make_jpeg(60, 40))
    told: list[float] = []

    def tell(rate: float, run: Run) -> None:
        told.append(rate)

    with gateway(make_repository(tmp_path / "repository"), default_classify="colours") as url:
        sent = [shot(f"{url}/v1/classify", tmp_path / "small.jpg")]
        found = find(sent, Wanted(seconds=1, limit=1000, start=5, ceiling=10, repeats=1, max_steps=3), tell)
    assert told == [5, 10]
    assert (found.rate, found.search.fails, found.search.settled) == (10, None, True)
    document = json.loads(json.dumps(found.as_json()))
    assert [step["rate"] for step in document["steps"]] == [5, 10]
    assert all(step["within"] == 1 for step in document["steps"])
    assert "Highest rate with 99% within 1000 ms: 10/s (100.00%); lowest that fails: none." in str(found)


def test_servers_are_started_in_turn_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VITRINE_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "small", Model("", "colours"))
    monkeypatch.setattr(models, "make_all", lambda: make_repository(models.repository()))
    monkeypatch.setattr(goodput, "RESULTS", tmp_path)
    monkeypatch.setattr(goodput, "CONTENDERS", {"first": CONTENDERS["vitrine"], "second": CONTENDERS["vitrine, base64"]})
    with pytest.raises(typer.Exit) as ended:
        main(servers="first,second", seconds=1, repeats=1, first=20, max_steps=1)  # at 2 a second, one second in seven is empty
    assert ended.value.exit_code == 1  # one step cannot settle it
    found = json.loads((tmp_path / "goodput.json").read_text())
    assert [[step["requests"] > 0 for step in found["servers"][name]["steps"]] for name in ("first", "second")] == [[True]] * 2
    assert str(tmp_path) not in json.dumps(found)
    assert "goodput of first over second's" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="no row 'third'"):
        main(servers="first,third")
