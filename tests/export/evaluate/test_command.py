"""`python -m export eval` as people run it, and what it says of models and options that do not go together."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.keys import make_key
from export.evaluate.command import app
from tests import tokenizer_repository
from tests.export.evaluate.conftest import is_one_sentence, paint
from tests.gateway import environment, free_port, gateway

Ask = Callable[..., Result]
RED = (220, 10, 10)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    paint(tmp_path / "data/red/a.png", RED)
    return tmp_path / "data"


def test_keys(repository: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent to a gateway that wants one; that of the command itself wants none."""
    key, known = make_key("measures")
    monkeypatch.setenv("VITRINE_API_KEYS", str(known))
    command = ["colours", "--data", str(pictures)]
    assert CliRunner().invoke(app, [*command, "--repository", str(repository)]).exit_code == 0
    with gateway(repository, api_keys=str(known)) as url:
        refused = CliRunner().invoke(app, [*command, "--url", url])
        assert is_one_sentence(refused, "wants an API key")
        monkeypatch.setenv("VITRINE_API_KEY", key)
        assert CliRunner().invoke(app, [*command, "--url", url]).exit_code == 0


def test_as_a_process_without_a_gateway_and_without_torch(repository: Path, pictures: Path, tmp_path: Path) -> None:
    """A table on stdout, nothing else; the working directory is nobody's."""
    command = [sys.executable, "-X", "importtime", "-m", "export", "eval", "colours@1", "--data", "data", "--json", "out.json"]
    ran = subprocess.run(
        [*command, "--repository", str(repository)], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert "│ top1" in ran.stdout
    assert "100.0%" in ran.stdout
    assert "colours@1" in ran.stdout
    modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "app.client" in modules
    assert not modules & {"torch", "export.spec", "onnx"}
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "model": "colours@1",
        "task": "classify",
        "data": "data",
        "images": 1,
        "figures": {"top1": 1.0, "top5": 1.0},
        "failed": [],
        "by_class": {"red": {"top1": 1.0, "top5": 1.0}},
    }


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nothing", "There is no model nothing; models to evaluate are: colours, masked, phrases, shapes, twins, unnamed."),
        ("colours@7", "There is no model colours@7"),
        ("no/thing?", "There is no model no/thing?"),
        (tokenizer_repository.NAME, "there are measures for classify, detect, ground"),
        ("shapes", "is a model for detect: --data is a JSON file in COCO's format"),
        ("phrases", "is a model for ground: --data is JSON"),
        ("broken", "cannot serve"),
    ],
)
def test_a_model_that_cannot_be_measured_on_a_folder(ask: Ask, pictures: Path, model: str, words: str) -> None:
    assert is_one_sentence(ask(model, "--data", pictures), words)


def test_no_gateway_answers(pictures: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = CliRunner().invoke(app, ["colours", "--data", str(pictures), "--url", url])
    assert is_one_sentence(result, f"Nothing answers at {url}")


@pytest.mark.parametrize(
    "arguments",
    [("--data", "none"), ("--json", "none/out.json"), ("--results", "none/out.json"), ("--repository", "."), ("--map", "x")],
)
def test_options_that_cannot_be_meant(ask: Ask, pictures: Path, arguments: tuple[str, ...]) -> None:
    result = ask("colours", "--data", pictures, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_without_pycocotools_a_detector_is_not_asked(ask: Ask, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    assert is_one_sentence(ask("shapes", "--data", pictures), "pycocotools", code=2)
    assert ask("colours", "--data", pictures).exit_code == 0
