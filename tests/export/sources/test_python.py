"""The user's own network, from the user's own file."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from export.load import load
from export.spec import ExportError, ExportRequest, PreprocessingOverrides
from tests.export.small import SmallNet

HEADER = """
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

@dataclass
class Options:
    width: int = WIDTH

"""
MAKE = """
def make(num_classes=4, width=WIDTH):
    stem = nn.Conv2d(3, Options(width).width, 8, 8)
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""
CONFIG = "pretrained_cfg = {'input_size': (3, 32, 32), 'mean': (0.5,), 'std': (0.25,), 'crop_pct': 0.8}\n"
FLAGS = PreprocessingOverrides(input_size=(32, 32), resize=40, mean=(0.5,), std=(0.25,))


def write(directory: Path, body: str) -> Path:
    (directory / "neighbour.py").write_text("WIDTH = 6\n")
    file = directory / "mynet.py"
    file.write_text(HEADER + body)
    return file


def request(file: Path | str, factory: str = "make", **fields: Any) -> ExportRequest:
    return ExportRequest(f"python/{file}:{factory}", Path("repository"), **({"weights": "random"} | fields))


@pytest.fixture(autouse=True)
def _forget_the_neighbour() -> Any:
    before = list(sys.path)
    yield
    sys.modules.pop("neighbour", None)
    assert sys.path == before


def test_a_factory_with_a_config_in_its_file(tmp_path: Path) -> None:
    loaded = load(request(write(tmp_path, CONFIG + MAKE), num_classes=5, model_args={"width": 8}))

    assert (loaded.num_classes, loaded.labels) == (5, ())
    assert (loaded.preprocessing.resize_height, loaded.preprocessing.height) == (40, 32)
    assert loaded.source.library == "python"
    assert loaded.source.architecture == "mynet.py:make"
    assert loaded.source.arguments == {"width": 8}


def test_a_config_on_the_network(tmp_path: Path) -> None:
    config = "network.default_cfg = dict(input_size=(3, 32, 32), mean=(0,), std=(1,))"
    body = MAKE + f"\ndef made():\n    network = make()\n    {config}\n    return network\n"
    loaded = load(request(write(tmp_path, body), "made"))

    assert loaded.preprocessing.resize_height == 36  # 32 / 0.875, timm's default


def test_flags_in_place_of_a_config(tmp_path: Path) -> None:
    file = write(tmp_path, MAKE)
    with pytest.raises(ExportError, match="--input-size, --resize, --mean, --std"):
        load(request(file))

    assert load(request(file, preprocessing=FLAGS)).preprocessing.resize_height == 40


def test_half_a_config_is_not_completed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no mean and no std"):
        load(request(write(tmp_path, "default_cfg = {'input_size': (3, 32, 32)}\n" + MAKE)))


def test_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text("from tests.export.small import SmallNet as make\n")
    trained = SmallNet()
    torch.save({"ema": trained.state_dict()}, tmp_path / "small.pth")

    loaded = load(request(file, weights="checkpoint", checkpoint=tmp_path / "small.pth", preprocessing=FLAGS))

    assert isinstance(loaded.network, SmallNet)
    assert torch.equal(loaded.network.head.weight, trained.head.weight)
    assert loaded.weights is not None
    assert loaded.weights.wrapper == "ema"


def test_pretrained_means_that_the_factory_brings_its_weights(tmp_path: Path) -> None:
    body = CONFIG + MAKE + "\ndef trained():\n    network = make()\n    network[3].bias.data.fill_(2.5)\n    return network\n"
    loaded = load(request(write(tmp_path, body), "trained", weights="pretrained"))

    assert loaded.source.weights == "pretrained"
    assert isinstance(loaded.network, torch.nn.Sequential)
    assert (loaded.network[3].bias == 2.5).all()  # type: ignore[union-attr,comparison-overlap,operator]


@pytest.mark.parametrize(
    ("body", "factory", "message"),
    [
        ("def make(:\n", "make", "cannot be imported: SyntaxError"),
        ("import no_such_module_anywhere\n", "make", "no_such_module_anywhere"),
        ("", "make", "no such function"),
        ("def make():\n    raise RuntimeError('no disk')\n", "make", "fails: RuntimeError: no disk"),
        ("def make():\n    return 3\n", "make", "gives a int, not a torch.nn.Module"),
        (CONFIG + "def make():\n    return nn.Identity()\n", "make", r"gives torch.float32 \[2, 3, 32, 32\]"),
        (CONFIG + "def make():\n    return nn.Linear(4, 4)\n", "make", "fails on images of 32x32"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, body: str, factory: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load(request(write(tmp_path, body), factory, weights="pretrained"))


def test_another_number_of_classes_than_asked_for(tmp_path: Path) -> None:
    body = CONFIG + MAKE + "\ndef fixed():\n    return make(4)\n"
    with pytest.raises(ExportError, match="of 4 classes, not of 5"):
        load(request(write(tmp_path, body), "fixed", num_classes=5))


@pytest.mark.parametrize("identifier", ["nowhere.py:make", "mynet.py", "mynet.py:not a name", ":make"])
def test_how_to_write_it(identifier: str) -> None:
    with pytest.raises(ExportError, match=r"There is no file|python/FILE.py:factory"):
        load(ExportRequest(f"python/{identifier}", Path("repository"), weights="random"))
