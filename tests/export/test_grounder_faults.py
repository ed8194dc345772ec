"""Verification of grounding must be able to fail: each deliberate fault of an engine or of the served path is caught, by name."""

import copy
from collections.abc import Callable
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
from app.text import Phrase, PhraseTokenizer
from export.bert_tokenizer import train_tokenizer, vocabulary_of
from export.fuse_grounder import fuse_grounder
from export.load import load
from export.phrases import grounding_phrases
from export.spec import Engine, GroundingReference, LoadedGrounder, VerificationError
from export.stage import stage
from export.to_onnx import to_onnx
from export.verify_grounder import verify_grounder
from tests.export.grounders import GROUNDERS

FAMILY = GROUNDERS["transvg_pp"]
ENGINE = {f"engine, batch {batch}: box" for batch in (1, 3, 8)}


@pytest.fixture(scope="module")
def grounder(tmp_path_factory: pytest.TempPathFactory) -> LoadedGrounder:
    loaded = load(FAMILY.request(tmp_path_factory.mktemp("grounder")))
    assert isinstance(loaded, LoadedGrounder)
    return loaded


@pytest.fixture(scope="module")
def engine(grounder: LoadedGrounder, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(grounder, tmp_path_factory.mktemp("engine"))


def make_engine(loaded: LoadedGrounder, directory: Path) -> Engine:
    return to_onnx(fuse_grounder(loaded), directory / "model.onnx", "fp32")


def failed_checks(directory: Path, engine: Engine, loaded: LoadedGrounder, staged_as: LoadedGrounder | None = None) -> set[str]:
    """What verification says of the engine against the network of `loaded`; nothing when it passes."""
    with stage([engine], staged_as or loaded, FAMILY.request(directory)) as (staged,):
        try:
            verify_grounder(staged, GroundingReference(loaded.network, loaded.vocabulary))
        except VerificationError as error:
            return {check.name for check in error.verification.checks if not check.passed}
    return set()


def changed(loaded: LoadedGrounder, change: Callable[[Any], None]) -> LoadedGrounder:
    network = copy.deepcopy(loaded.network)
    with torch.no_grad():
        change(network)
    return replace(loaded, network=network.eval())


class Unread(nn.Module):
    """A block's look at the words that sees nothing."""

    def forward(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        return torch.zeros_like(queries)


class Unmasked(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = self.attention(queries, keys)
        return found


def swap_channels(network: Any) -> None:
    network.visual_branch.patch_embed.proj.weight.copy_(network.visual_branch.patch_embed.proj.weight.flip(1))


def drop_a_layer_of_bert(network: Any) -> None:
    del network.language_branch.language_backbone.encoder.layer[1]


def look_at_the_words_once_less(network: Any) -> None:
    network.visual_branch.blocks[2].lang_modulation = Unread()


def look_at_the_padding(network: Any) -> None:
    network.visual_branch.blocks[1].lang_modulation = Unmasked(network.visual_branch.blocks[1].lang_modulation)


def test_the_control_has_no_fault(tmp_path: Path, engine: Engine, grounder: LoadedGrounder) -> None:
    assert failed_checks(tmp_path, engine, grounder) == set()


@pytest.mark.parametrize("fault", [swap_channels, drop_a_layer_of_bert, look_at_the_words_once_less, look_at_the_padding])
def test_a_fault_of_the_engine_is_caught(tmp_path: Path, grounder: LoadedGrounder, fault: Callable[[Any], None]) -> None:
    faulty = make_engine(changed(grounder, fault), tmp_path)
    failed = failed_checks(tmp_path, faulty, grounder)
    assert failed >= ENGINE
    assert failed <= ENGINE | {"served path: box"}


def test_a_wrong_mean_is_caught(tmp_path: Path, grounder: LoadedGrounder) -> None:
    preprocessing = grounder.preprocessing.model_copy(update={"mean": (0.4, 0.4, 0.4)})
    faulty = make_engine(replace(grounder, preprocessing=preprocessing), tmp_path)
    assert failed_checks(tmp_path, faulty, grounder) >= ENGINE


def test_a_network_that_does_not_read_is_not_verified(tmp_path: Path, grounder: LoadedGrounder) -> None:
    """Engine and reference agree perfectly, and it means nothing."""

    def dull(network: Any) -> None:
        network.text_proj.weight.zero_()

    blind = changed(grounder, dull)
    assert failed_checks(tmp_path, make_engine(blind, tmp_path), blind) == {"sees another phrase: box"}


def test_an_image_padded_elsewhere_is_caught(
    tmp_path: Path, engine: Engine, grounder: LoadedGrounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cornered(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> np.ndarray:
        return resize(image, preprocessing.model_copy(update={"anchor": "corner"}), original)

    monkeypatch.setattr(export.served, "resize", cornered)
    failed = failed_checks(tmp_path, engine, grounder)
    assert {"pixels: off by more than one level", "served path: box"} <= failed


def test_a_crop_off_by_one_is_caught(
    tmp_path: Path, engine: Engine, grounder: LoadedGrounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> np.ndarray:
        return np.roll(resize(image, preprocessing, original), 1, axis=1)

    monkeypatch.setattr(export.served, "resize", off_by_one)
    failed = failed_checks(tmp_path, engine, grounder)
    assert {"pixels: off by more than one level", "served path: box"} <= failed


def test_a_black_image_is_caught(tmp_path: Path, engine: Engine, grounder: LoadedGrounder, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
        image, info = decode(opened)
        return Image.new("RGB", image.size), info

    monkeypatch.setattr(export.served, "decode", black)
    failed = failed_checks(tmp_path, engine, grounder)
    assert {"pixels: off by more than one level", "served path: box"} <= failed


def test_another_tokenizer_is_caught(tmp_path: Path, engine: Engine, grounder: LoadedGrounder) -> None:
    """One that keeps capital letters, and one of another vocabulary."""
    cased = grounder.vocabulary.file.replace(b'"lowercase":true', b'"lowercase":false')
    assert cased != grounder.vocabulary.file
    other = vocabulary_of(train_tokenizer(grounding_phrases()[:50], 300)).file
    for file, limits in ((cased, set()), (other, ENGINE)):
        staged_as = replace(grounder, vocabulary=replace(grounder.vocabulary, file=file))
        failed = failed_checks(tmp_path, engine, grounder, staged_as)
        assert failed >= {"tokenizer: other ids in 1,500 strings", *limits}


@pytest.mark.parametrize("too_long", ["refuse", "truncate"])
def test_a_tokenizer_that_counts_wrong_is_caught(
    tmp_path: Path, engine: Engine, grounder: LoadedGrounder, too_long: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PhraseTokenizer.encode

    def one_less(tokenizer: PhraseTokenizer, phrase: str) -> Phrase:
        found = encode(tokenizer, phrase)
        last = np.flatnonzero(found.attention_mask)[-1]
        return Phrase(found.input_ids, np.where(np.arange(len(found.input_ids)) < last, found.attention_mask, 0), found.truncated)

    monkeypatch.setattr(PhraseTokenizer, "encode", one_less)
    failed = failed_checks(tmp_path, engine, replace(grounder, long_phrases=too_long))
    assert {"tokenizer: other ids in 1,500 strings"} < failed
