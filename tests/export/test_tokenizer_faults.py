"""Verification of a tokenizer must be able to fail: each deliberate fault of an engine or of the served path is caught, by name."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import export.served
from app.decode import ImageInfo, OpenedImage, decode
from app.manifest import Preprocessing
from app.resize import resize
from export.fuse import fuse
from export.load import load
from export.spec import Engine, LoadedTokenizer, VerificationError
from export.stage import stage
from export.to_onnx import to_onnx
from export.token_agreement import TOLERANCES, ReferenceTokens, compare_tokens
from export.verify_tokenizer import verify_tokenizer
from tests.export.tokenizers import TOKENIZERS

FAMILY = TOKENIZERS["vit_vqgan"]
Engines = Sequence[Engine]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    loaded = load(FAMILY.request(tmp_path_factory.mktemp("tokenizer")))
    assert isinstance(loaded, LoadedTokenizer)
    return loaded


@pytest.fixture(scope="module")
def engines(tokenizer: LoadedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return make_engines(tokenizer, tmp_path_factory.mktemp("engines"))


def make_engines(loaded: LoadedTokenizer, directory: Path, role: str = "") -> Engines:
    """Both engines, or only that of `role`."""
    wanted = [part for part in fuse(loaded) if role in ("", part.interface.role)]
    return [to_onnx(part, directory / f"{part.interface.role}.onnx", "fp32") for part in wanted]


def failed_checks(directory: Path, engines: Engines, loaded: LoadedTokenizer) -> set[str]:
    """What verification says of these engines against the network of `loaded`; nothing when they pass."""
    with stage(engines, loaded, FAMILY.request(directory)) as staged:
        try:
            verify_tokenizer(staged, loaded.network)
        except VerificationError as error:
            return {check.name for check in error.verification.checks if check.required and not check.passed}
    return set()


def changed(loaded: LoadedTokenizer, change: Callable[[Any], None]) -> LoadedTokenizer:
    network = copy.deepcopy(loaded.network)
    with torch.no_grad():
        change(network)
    return replace(loaded, network=network.eval())


def swap_channels(network: Any) -> None:
    network.encoder.to_patch_embedding[0].weight.copy_(network.encoder.to_patch_embedding[0].weight.flip(1))


def drop_a_block(network: Any) -> None:
    network.encoder.transformer.layers[1] = nn.ModuleList([nn.Identity(), nn.Identity()])


def drop_a_block_of_the_decoder(network: Any) -> None:
    network.decoder.transformer.layers[1] = nn.ModuleList([nn.Identity(), nn.Identity()])


def swap_channels_of_the_decoder(network: Any) -> None:
    network.decoder.to_pixel[1].weight.copy_(network.decoder.to_pixel[1].weight.flip(1))


def shuffle_codes(network: Any) -> None:
    network.quantizer.embedding.weight.copy_(network.quantizer.embedding.weight.roll(1, 0))


def test_the_control_has_no_fault(tmp_path: Path, engines: Engines, tokenizer: LoadedTokenizer) -> None:
    assert failed_checks(tmp_path, engines, tokenizer) == set()


@pytest.mark.parametrize("fault", [swap_channels, drop_a_block, shuffle_codes])
def test_a_fault_of_the_encoder_is_caught(
    tmp_path: Path, engines: Engines, tokenizer: LoadedTokenizer, fault: Callable[[Any], None]
) -> None:
    (faulty,) = make_engines(changed(tokenizer, fault), tmp_path, "tokenize")
    failed = failed_checks(tmp_path, [faulty, engines[1]], tokenizer)
    expected = {f"engine, batch {batch}: {what}" for batch in (1, 3, 8) for what in ("token agreement", "largest margin")}
    assert expected | {"served path: token agreement"} <= failed
    assert not any("pixel" in name for name in failed)


@pytest.mark.parametrize("fault", [swap_channels_of_the_decoder, drop_a_block_of_the_decoder, shuffle_codes])
def test_a_fault_of_the_decoder_is_caught(
    tmp_path: Path, engines: Engines, tokenizer: LoadedTokenizer, fault: Callable[[Any], None]
) -> None:
    (faulty,) = make_engines(changed(tokenizer, fault), tmp_path, "detokenize")
    failed = failed_checks(tmp_path, [engines[0], faulty], tokenizer)
    assert failed == {f"engine, batch {batch}: pixel agreement" for batch in (1, 3, 8)}


@pytest.mark.parametrize("wrong", [{"mean": (0.1, 0.1, 0.1)}, {"std": (0.8, 0.8, 0.8)}], ids=["mean", "std"])
def test_a_wrong_normalisation_is_caught(tmp_path: Path, tokenizer: LoadedTokenizer, wrong: dict[str, Any]) -> None:
    faulty = replace(tokenizer, preprocessing=tokenizer.preprocessing.model_copy(update=wrong))
    failed = failed_checks(tmp_path, make_engines(faulty, tmp_path), tokenizer)
    assert {"engine, batch 1: token agreement", "engine, batch 8: pixel agreement"} <= failed


def test_a_crop_off_by_one_is_caught(
    tmp_path: Path, engines: Engines, tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> np.ndarray:
        return np.roll(resize(image, preprocessing, original), 1, axis=1)

    monkeypatch.setattr(export.served, "resize", off_by_one)
    failed = failed_checks(tmp_path, engines, tokenizer)
    assert {"pixels: off by more than one level", "served path: token agreement"} <= failed


def test_a_black_image_is_caught(
    tmp_path: Path, engines: Engines, tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def black(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
        image, info = decode(opened)
        return Image.new("RGB", image.size), info

    monkeypatch.setattr(export.served, "decode", black)
    failed = failed_checks(tmp_path, engines, tokenizer)
    assert {"pixels: off by more than one level", "engine: distinct codes", "sees another image: tokens"} <= failed


def test_a_tokenizer_that_says_the_same_of_every_image_is_not_verified(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    """Engines and reference agree perfectly, and it means nothing."""

    def dull(network: Any) -> None:
        network.pre_quant.weight.zero_()

    blind = changed(tokenizer, dull)
    failed = failed_checks(tmp_path, make_engines(blind, tmp_path), blind)
    assert {"engine: distinct codes", "sees a black image: tokens", "sees swapped channels: tokens"} <= failed


def test_images_that_hardly_depend_on_tokens_are_not_verified(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    def dull(network: Any) -> None:
        network.decoder.to_pixel[1].weight.mul_(1e-3)

    blind = changed(tokenizer, dull)
    failed = failed_checks(tmp_path, make_engines(blind, tmp_path), blind)
    assert failed == {"sees other codes: pixels", "sees another image: pixels"}


def test_a_near_tie_may_go_either_way_and_anything_farther_not() -> None:
    """A latent just beyond the border between two codes has a margin near zero, one in the middle of a cell a large one."""
    codes = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    points = torch.tensor([[0.499999, 0.0], [0.1, 0.0], [0.9, 0.3], [0.2, -0.3]], dtype=torch.float64).view(1, 1, 2, 2, 2)
    tokens = np.array([[[[0, 0], [1, 0]]]])
    reference = ReferenceTokens(tokens, points, codes)
    near, far = (np.array([[[[a, b], [1, 0]]]]) for a, b in ((1, 0), (0, 1)))
    assert reference.margins(tokens).size == 0
    assert 0 < reference.margins(near)[0] < TOLERANCES["fp32"].margin
    assert reference.margins(far)[0] > 0.5


def test_a_token_that_is_no_code_is_caught() -> None:
    codes = torch.randn(1, 4, 2, dtype=torch.float64)
    reference = ReferenceTokens(np.zeros((1, 1, 2, 2), int), Tensor(1, 1, 2, 2, 2).normal_().double(), codes)
    served = np.array([[[[0, 0], [0, 4]]]])
    failed = {check.name for check in compare_tokens("engine", served, reference, TOLERANCES["fp32"]) if not check.passed}
    assert "engine: tokens that are codes" in failed
