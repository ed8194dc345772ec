"""Tokenizers of diffusers: a directory or the hub, tokens and images as the library's own."""

import json
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from app.manifest import read_entry
from export.informative import sample_images
from export.load import load
from export.pipeline import export
from export.spec import ExportError, ExportRequest, LoadedTokenizer, PreprocessingOverrides, image_tensor

CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 8,
    "vq_embed_dim": 6,
    "sample_size": 64,
    "num_vq_embeddings": 512,
    "norm_num_groups": 8,
}


def library(**changes: Any) -> Any:
    """A network whose codes are latents of images, as training leaves them."""
    torch.manual_seed(0)
    network = diffusers.VQModel(**(CONFIG | changes)).eval()
    with torch.no_grad():
        latents = network.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latents[0].flatten(1).T
        network.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:512]])
    return network


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What `save_pretrained` writes."""
    library().save_pretrained(tmp_path / "vq")
    return tmp_path / "vq"


def request(place: Path | str, **fields: Any) -> ExportRequest:
    return ExportRequest(f"diffusers/{place}", **({"repository": Path("repository"), "weights": "pretrained"} | fields))


@pytest.mark.parametrize("changes", [{}, {"norm_type": "spatial", "vq_embed_dim": 8}], ids=["vqgan", "movq"])
def test_tokens_and_images_are_those_of_the_library(changes: dict[str, Any], tmp_path: Path) -> None:
    network = library(**changes)
    network.save_pretrained(tmp_path / "vq")
    loaded = load(request(tmp_path / "vq"))
    assert isinstance(loaded, LoadedTokenizer)
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (loaded.preprocessing.height, loaded.preprocessing.policy) == (64, "shortest_edge")
    assert (loaded.codebook.size, loaded.codebook.channels, loaded.codebook.grid) == (512, network.config.vq_embed_dim, (32, 32))
    images = image_tensor(sample_images(loaded.preprocessing, 2, seed=3), loaded.preprocessing)
    with torch.inference_mode():
        latents = network.encode(images).latents
        codes, _, (_, _, indices) = network.quantize(latents)
        tokens = loaded.network.tokenize(images)
        assert torch.equal(tokens.flatten(), indices)
        torch.testing.assert_close(loaded.network.detokenize(tokens), network.decode(latents).sample)
        assert codes.std() > 0.01


def test_export_verify_publish(home: Path, tmp_path: Path) -> None:
    published = export(request(home, weights="random", repository=tmp_path / "repository", name="vq"), lambda stage: None)
    encoder, decoder = (read_entry(path) for path in published.paths)
    assert encoder.manifest.verification is not None
    assert encoder.manifest.verification.passed
    assert (encoder.manifest.source.library, encoder.manifest.source.architecture) == ("diffusers", "VQModel")
    assert encoder.manifest.codebook == decoder.manifest.codebook
    session = onnxruntime.InferenceSession(str(encoder.path / "model.onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert len(np.unique(session.run(None, {"image": pixels})[0])) >= 100


def test_a_pipeline_keeps_it_in_a_folder(home: Path, tmp_path: Path) -> None:
    home.rename(tmp_path / "movq")
    assert load(request(f"{tmp_path}:movq")).source.checkpoint == f"{tmp_path.name}:movq"
    with pytest.raises(ExportError, match=f"{tmp_path}:vqvae"):
        load(request(tmp_path))


def test_a_checkpoint_of_ones_own(home: Path, tmp_path: Path) -> None:
    tensors = load_file(home / "diffusion_pytorch_model.safetensors")
    save_file({key: value + 0.01 for key, value in tensors.items()}, tmp_path / "tuned.safetensors")
    loaded = load(request(home, weights="checkpoint", checkpoint=tmp_path / "tuned.safetensors"))
    assert isinstance(loaded.network, nn.Module)
    key = "quant_conv.weight"
    torch.testing.assert_close(loaded.network.state_dict()[f"network.{key}"], tensors[key] + 0.01)


def test_weights_that_do_not_fit_are_refused(home: Path) -> None:
    file = home / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["quant_conv.bias"]
    save_file(tensors, file)
    with pytest.raises(ExportError, match=r"missing keys: quant_conv\.bias"):
        load(request(home))


def test_the_network_is_an_argument(home: Path) -> None:
    loaded = load(request(home, weights="random", model_args={"num_vq_embeddings": 256}))
    assert isinstance(loaded, LoadedTokenizer)
    assert loaded.codebook.size == 256
    with pytest.raises(ExportError, match="no depth"):
        load(request(home, weights="random", model_args={"depth": 2}))


@pytest.mark.parametrize("size", [32, None, [64, 64]])  # 32 is what the library writes when nothing was given
def test_a_size_that_nobody_says_is_asked_for(home: Path, size: Any) -> None:
    rewrite(home, sample_size=size)
    with pytest.raises(ExportError, match="--input-size"):
        load(request(home, weights="random"))
    said = load(request(home, weights="random", model_args={"sample_size": 32}))
    assert said.preprocessing.height == 32


def test_amused_sees_images_from_0_to_1(home: Path) -> None:
    rewrite(home, lookup_from_codebook=True)
    preprocessing = load(request(home)).preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0, 0, 0), (1, 1, 1))


def test_an_image_size_of_ones_own(home: Path) -> None:
    loaded = load(request(home, preprocessing=PreprocessingOverrides(input_size=(32, 48), resize=(32, 48))))
    assert isinstance(loaded, LoadedTokenizer)
    assert loaded.codebook.grid == (16, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is of AutoencoderKL; of diffusers only VQModel"),
        ({"in_channels": 1}, "only these are served"),
        ({"norm_num_groups": 7}, "cannot build"),
    ],
)
def test_what_is_not_served_is_refused(home: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(home, **changes)
    with pytest.raises(ExportError, match=message):
        load(request(home, weights="random"))


def test_a_tokenizer_has_no_classes(home: Path) -> None:
    with pytest.raises(ExportError, match="--num-classes, --activation"):
        load(request(home, num_classes=3, activation="softmax"))


def test_a_directory_may_have_a_colon(home: Path, tmp_path: Path) -> None:
    home.rename(tmp_path / "a:b")
    assert load(request(tmp_path / "a:b")).source.architecture == "VQModel"


def test_the_hub_is_asked_for_what_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=r"'nobody/vq' with a folder 'vqvae' is neither"):
        load(request("nobody/vq:vqvae"))


def rewrite(home: Path, **changes: Any) -> None:
    file = home / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
