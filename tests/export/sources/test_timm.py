"""Networks of timm: their data config, their labels, and the checkpoints their authors published."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from torch import Tensor, nn

from export.load import load
from export.sources.timm import _labels
from export.spec import ExportError, ExportRequest, PreprocessingOverrides

NARROW: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}


def request(source: str = "timm/convnext_atto", **fields: Any) -> ExportRequest:
    defaults: dict[str, Any] = {"weights": "random", "num_classes": 7, "model_args": NARROW}
    return ExportRequest(source, Path("repository"), **(defaults | fields))


def small(**fields: Any) -> PreprocessingOverrides:
    return PreprocessingOverrides(input_size=(64, 64), **fields)


def test_a_network_and_all_that_is_known_of_it() -> None:
    loaded = load(request("timm/convnext_atto.d2_in1k", preprocessing=small(), licence="MIT"))

    assert isinstance(loaded.network, nn.Module)
    assert not loaded.network.training
    assert (loaded.num_classes, loaded.labels, loaded.activation, loaded.weights) == (7, (), "softmax", None)
    assert loaded.preprocessing.resize_height == 73  # 64 / 0.875
    assert loaded.source.library == "timm"
    assert loaded.source.architecture == "convnext_atto"
    assert loaded.source.arguments == NARROW | {"num_classes": 7}
    assert (loaded.source.weights, loaded.source.checkpoint, loaded.source.licence) == ("random", None, "MIT")
    libraries = {"torch", "timm", "transformers", "open_clip_torch", "diffusers", "onnx", "onnxscript"}
    assert loaded.source.versions.keys() == libraries


def test_a_fixed_size_network_is_built_for_the_input_size() -> None:
    arguments = {"embed_dim": 48, "depth": 1}
    loaded = load(request("timm/deit_tiny_patch16_224", model_args=arguments, preprocessing=small()))

    assert loaded.preprocessing.height == 64
    assert loaded.source.arguments["img_size"] == (64, 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm/convnext_attto", "near: convnext_atto"),
        ("timm/convnext_atto.no_such_tag", "there are: d2_in1k"),
    ],
)
def test_an_unknown_name_offers_the_nearest(source: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load(request(source))


def test_arguments_it_does_not_take_are_refused() -> None:
    with pytest.raises(ExportError, match=r"cannot be built with .*colour"):
        load(request(model_args={"colour": "blue"}))
    with pytest.raises(ExportError, match="--input-size"):
        load(request(model_args={"img_size": 64}))


def test_a_tower_without_a_head_asks_for_classes() -> None:
    with pytest.raises(ExportError, match="no classification head; pass --num-classes"):
        load(request("timm/vit_small_patch14_dinov2.lvd142m", num_classes=None, model_args={}))


def test_a_pretrained_head_is_not_thrown_away() -> None:
    with pytest.raises(ExportError, match="pretrained head has 1000 classes"):
        load(request(weights="pretrained"))


def test_without_a_network_fetching_fails_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ExportError, match="could not fetch the weights of convnext_atto"):
        load(request(weights="pretrained", num_classes=None, model_args={}))


def test_published_heads_of_imagenet_have_its_labels() -> None:
    labels = _labels(timm.get_pretrained_cfg("convnext_atto.d2_in1k").to_dict())

    assert len(labels) == 1000
    assert labels[0] == "tench, Tinca tinca"
    assert len(_labels(timm.get_pretrained_cfg("convnext_base.fb_in22k").to_dict())) == 21841
    assert _labels({"num_classes": 7}) == ()


def test_random_heads_have_no_labels() -> None:
    loaded = load(request(num_classes=None, preprocessing=small()))

    assert (loaded.num_classes, loaded.labels) == (1000, ())


def checkpoint(source: str, tensors: dict[str, Tensor], directory: Path, **fields: Any) -> ExportRequest:
    torch.save({"model": tensors}, directory / "authors.pth")
    return request(source, weights="checkpoint", checkpoint=directory / "authors.pth", **fields)


def as_authors_name_convnext(key: str) -> str:
    key = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", key)
    key = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", key)
    key = re.sub(r"(stages\.\d)\.blocks", r"\1", key)
    key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return key.replace("head.fc.", "head.").replace("head.norm", "norm")


def as_authors_name_crossvit(key: str) -> str:
    return re.sub(r"^(pos_embed|cls_token)_", r"\1.", key)


CROSSVIT: dict[str, Any] = {"embed_dim": (24, 48), "depth": ((1, 1, 0),)}


@pytest.mark.parametrize(
    ("name", "arguments", "renamed", "size"),
    [("convnext_atto", NARROW, as_authors_name_convnext, 64), ("crossvit_tiny_240", CROSSVIT, as_authors_name_crossvit, 120)],
)
def test_checkpoints_as_their_authors_published_them_load(
    name: str, arguments: dict[str, Any], renamed: Any, size: int, tmp_path: Path
) -> None:
    sized = {"img_size": size} if name.startswith("crossvit") else {}
    trained = timm.create_model(name, num_classes=7, **arguments, **sized)
    tensors = {renamed(key): value for key, value in trained.state_dict().items()}
    assert tensors.keys() != trained.state_dict().keys()

    overrides = PreprocessingOverrides(input_size=(size, size))
    loaded = load(checkpoint(f"timm/{name}", tensors, tmp_path, model_args=arguments, preprocessing=overrides))

    assert isinstance(loaded.network, nn.Module)
    assert all(torch.equal(value, loaded.network.state_dict()[key]) for key, value in trained.state_dict().items())
    assert loaded.weights is not None
    assert loaded.weights.wrapper == "model"
    assert loaded.source.checkpoint == "authors.pth"
    assert loaded.source.checkpoint_sha256 == loaded.weights.sha256
    assert "state_dict" not in loaded.network.pretrained_cfg


@pytest.mark.parametrize("renamed", [str, as_authors_name_convnext])
def test_a_head_of_another_size_names_the_flag(renamed: Any, tmp_path: Path) -> None:
    trained = timm.create_model("convnext_atto", num_classes=5, **NARROW)
    tensors = {renamed(key): value for key, value in trained.state_dict().items()}

    with pytest.raises(ExportError, match="has 5 classes, the network's has 7; pass --num-classes 5"):
        load(checkpoint("timm/convnext_atto", tensors, tmp_path, preprocessing=small()))


def test_weights_of_another_network_list_their_keys(tmp_path: Path) -> None:
    tensors = timm.create_model("deit_tiny_patch16_224", embed_dim=48, depth=1, num_classes=7).state_dict()

    with pytest.raises(ExportError, match=r"missing: stem.0.weight.*unexpected: cls_token"):
        load(checkpoint("timm/convnext_atto", tensors, tmp_path, preprocessing=small()))
