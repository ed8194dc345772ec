"""A source names a network, and exactly one way to get weights."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from export import architectures
from export.load import load
from export.spec import ExportError, ExportRequest
from tests.export.small import SmallNet


def request(source: str, **fields: Any) -> ExportRequest:
    return ExportRequest(source=source, repository=Path("repository"), **({"weights": "random"} | fields))


@pytest.mark.parametrize("source", ["convnext_atto", "keras/x", "timm", "timm/", "", "/"])
def test_an_unknown_source_lists_the_forms(source: str) -> None:
    forms = "timm/NAME[.TAG], transformers/PATH_OR_ID, open_clip/NAME[:TAG], diffusers/PATH_OR_ID[:FOLDER], python/FILE.py:factory"
    with pytest.raises(ExportError, match=re.escape(forms)):
        load(request(source))


@pytest.mark.parametrize("fields", [{"weights": None}, {"weights": "embedded"}])
def test_weights_must_be_chosen(fields: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="--pretrained, --checkpoint FILE or --random-init"):
        load(request("timm/convnext_atto", **fields))


@pytest.mark.parametrize(
    "fields",
    [{"weights": "checkpoint"}, {"weights": "random", "checkpoint": Path("a.pth")}, {"weights": None, "checkpoint": Path("a")}],
)
def test_weights_are_chosen_once(fields: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="--checkpoint FILE"):
        load(request("timm/convnext_atto", **fields))


def test_an_onnx_file_brings_its_own_weights() -> None:
    with pytest.raises(ExportError, match="its own weights"):
        load(request("onnx/model.onnx", weights="pretrained"))


@pytest.mark.parametrize(("precision", "advice"), [("int8", "fp32, fp16"), ("bf16", "--engine tensorrt")])
def test_a_precision_that_the_engine_does_not_run_is_refused_first(precision: str, advice: str) -> None:
    with pytest.raises(ExportError, match=advice):
        load(request("timm/no_such_model", precision=precision))


@pytest.fixture
def own_architecture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of export/architectures, as its docstring describes one."""
    module = ModuleType("export.architectures.smallnet")
    module.PREPROCESSING = {"input_size": (3, 32, 32), "mean": (0.5,), "std": (0.25,), "crop_pct": 0.8}  # type: ignore[attr-defined]
    module.PAPER = "arXiv:0000.00000"  # type: ignore[attr-defined]
    module.make = lambda num_classes, width=8: SmallNet(num_classes, width)  # type: ignore[attr-defined]
    module.convert = lambda tensors: {key.removeprefix("net_"): value for key, value in tensors.items()}  # type: ignore[attr-defined]
    monkeypatch.setattr(architectures, "names", lambda: ("smallnet",))
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    return module


def test_a_name_is_an_architecture_of_the_project(own_architecture: ModuleType) -> None:
    loaded = load(request("smallnet", num_classes=5, model_args={"width": 10}))

    assert loaded.num_classes == 5
    assert isinstance(loaded.network, nn.Module)
    assert loaded.source.library == "vitrine"
    assert loaded.source.paper == "arXiv:0000.00000"
    assert loaded.source.arguments == {"num_classes": 5, "width": 10}
    assert loaded.preprocessing.resize_height == 40
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)


def test_an_architecture_converts_its_authors_keys(own_architecture: ModuleType, tmp_path: Path) -> None:
    trained = SmallNet(5, 8)
    torch.save({f"net_{key}": value for key, value in trained.state_dict().items()}, tmp_path / "authors.pth")

    loaded = load(request("smallnet", weights="checkpoint", checkpoint=tmp_path / "authors.pth", num_classes=5))

    assert isinstance(loaded.network, SmallNet)
    assert torch.equal(loaded.network.head.weight, trained.head.weight)


def test_an_architecture_has_nothing_to_fetch(own_architecture: ModuleType) -> None:
    with pytest.raises(ExportError, match="--checkpoint FILE or --random-init"):
        load(request("smallnet", weights="pretrained"))


def test_an_unknown_architecture_lists_those_there_are(own_architecture: ModuleType) -> None:
    with pytest.raises(ExportError, match="smallnet"):
        load(request("no_such_net"))


def test_every_architecture_keeps_the_protocol() -> None:
    for name in architectures.names():
        module = architectures.find(name)
        assert callable(module.make)
        assert {"input_size", "mean", "std"} <= module.PREPROCESSING.keys()
        assert module.PAPER
