"""A gateway on engines whose answers are known, and the command that asks it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from app.local_gateway import local_gateway
from app.settings import Settings
from export.evaluate.command import app
from tests.detector_repository import add_detector, add_grounder, in_frame, letterbox
from tests.repository import add_entry, make_repository
from tests.tokenizer_repository import add_tokenizer

SIZE = (80, 60)
"""Width, height of every image."""

FOUND = [[10.0, 10.0, 50.0, 30.0], [20.0, 20.0, 60.0, 50.0], [0.0, 0.0, 5.0, 5.0]]
"""Boxes xyxy that the detector `shapes` finds in every image: a circle, a square, a Dreieck of the least score."""

POINTED = [30.0, 20.0, 70.0, 40.0]
"""The box xyxy that the grounding model `phrases` gives for every phrase."""


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = make_repository(tmp_path_factory.mktemp("evaluate") / "repository")
    add_detector(repository, in_frame(FOUND, letterbox(), SIZE), [0.9, 0.8, 0.3], [0, 1, 2])
    add_detector(repository, in_frame(FOUND, letterbox(), SIZE), [0.9, 0.8, 0.3], [0, 1, 2], name="unnamed", labels=())
    add_detector(repository, in_frame(FOUND, letterbox(), SIZE), [0.9, 0.8, 0.3], [0, 1, 2], name="masked", masks=True)
    add_detector(repository, in_frame(FOUND, letterbox(), SIZE), [0.9, 0.8, 0.3], [0, 1, 2], name="seeker", phrases=3)
    twins = ("Cup", "cup", "0")
    add_detector(repository, in_frame(FOUND, letterbox(), SIZE), [0.8, 0.9, 0.3], [0, 1, 2], name="twins", labels=twins)
    add_grounder(repository, in_frame([POINTED], letterbox("centre"), SIZE))
    add_tokenizer(repository)
    (add_entry(repository, "broken").path / "model.onnx").write_bytes(b"no engine")
    return repository


@pytest.fixture(scope="session")
def url(repository: Path) -> Iterator[str]:
    with local_gateway(Settings(_env_file=None, repository=repository, preload=False, repository_poll=0)) as address:
        yield address


@pytest.fixture
def ask(url: str) -> Callable[..., Result]:
    """`python -m export eval` with the gateway's address; anything but an exit is raised."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--url", url], catch_exceptions=False)

    return run


@pytest.fixture
def figures(ask: Callable[..., Result], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The same, for what the JSON of a command that succeeded says."""

    def run(*arguments: object) -> dict[str, Any]:
        result = ask(*arguments, "--json", tmp_path / "figures.json")
        assert result.exit_code == 0, result.output
        document: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
        return document

    return run


def paint(file: Path, colour: tuple[int, int, int] = (120, 120, 120)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, colour).save(file)


def is_one_sentence(result: Result, words: str, code: int = 1) -> bool:
    """Whether the command failed as commands should, with these words: that exit code, no table, one line on stderr."""
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (code, "", 1), result.output
    assert words in result.stderr, result.stderr
    return result.stderr.startswith("error: ") and result.stderr.rstrip().endswith(".")
