"""Verification of dual encoders must be able to fail: each deliberate fault of an engine or of the served path is caught, by name.

An engine that differs from its reference is a reference that differs from the engine: the network is changed, not exported again.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import export.served
import export.verify_dual_encoder
from app.manifest import Preprocessing
from app.resize import resize
from app.text import Phrase, PhraseTokenizer
from export.fuse import fuse
from export.load import load
from export.phrases import broken_texts, difficult_phrases
from export.spec import DualReference, Engine, LoadedDualEncoder, VerificationError
from export.stage import stage
from export.to_onnx import to_onnx
from export.verify_dual_encoder import verify_dual_encoder
from tests.export.dual_encoders import DUAL_ENCODERS

FAMILY = DUAL_ENCODERS["vit-clip"]
IMAGES = {f"engine, batch {batch}: image {what}" for batch in (1, 3, 8) for what in ("cosine", "vectors")}
TEXTS = {f"engine, batch {batch}: text {what}" for batch in (1, 3, 8) for what in ("cosine", "vectors")}
IDS = "tokenizer: other ids in 120 strings"
PIXELS = {"pixels: off by more than one level", "served path: image cosine"}
BOTH = "images x texts: probabilities"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedDualEncoder:
    loaded = load(FAMILY.request(tmp_path_factory.mktemp("dual")))
    assert isinstance(loaded, LoadedDualEncoder)
    return loaded


@pytest.fixture(scope="module")
def engines(loaded: LoadedDualEncoder, tmp_path_factory: pytest.TempPathFactory) -> list[Engine]:
    directory = tmp_path_factory.mktemp("engines")
    return [to_onnx(part, directory / f"{part.interface.role}.onnx", "fp32") for part in fuse(loaded)]


@pytest.fixture(autouse=True)
def fewer_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.verify_dual_encoder, "difficult_phrases", lambda: difficult_phrases()[:80])
    monkeypatch.setattr(export.verify_dual_encoder, "broken_texts", lambda: broken_texts()[:40])


def failed_checks(
    directory: Path,
    engines: list[Engine],
    loaded: LoadedDualEncoder,
    network: Any = None,
    staged_as: LoadedDualEncoder | None = None,
) -> set[str]:
    """What verification says of the engines against `network`, by default that of `loaded`; nothing when it passes."""
    with stage(engines, staged_as or loaded, FAMILY.request(directory)) as staged:
        try:
            verify_dual_encoder(staged, DualReference(network or loaded.network, loaded.vocabulary))
        except VerificationError as error:
            return {check.name for check in error.verification.checks if not check.passed}
    return set()


def changed(loaded: LoadedDualEncoder, change: Callable[[Any], None]) -> Any:
    network = copy.deepcopy(loaded.network)
    with torch.no_grad():
        change(network.network)
    return network.eval()


def swap_channels(network: Any) -> None:
    network.visual.conv1.weight.copy_(network.visual.conv1.weight.flip(1))


def drop_a_block_of_the_image_tower(network: Any) -> None:
    network.visual.transformer.resblocks[1] = nn.Identity()
    network.visual.transformer.resblocks[1].forward = lambda x, attn_mask=None: x


def gather_elsewhere(network: Any) -> None:
    """Not at the end of the text, but at the end of its padding."""
    network.text_pool_type = "last"


def see_what_comes_after(network: Any) -> None:
    network.attn_mask = torch.zeros_like(network.attn_mask)


def shift_positions(network: Any) -> None:
    network.positional_embedding.copy_(network.positional_embedding.roll(1, 0))


def test_the_control_has_no_fault(tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder) -> None:
    assert failed_checks(tmp_path, engines, loaded) == set()


def test_half_precision_has_no_fault_either(tmp_path: Path, loaded: LoadedDualEncoder) -> None:
    halves = [to_onnx(part, tmp_path / f"{part.interface.role}.onnx", "fp16") for part in fuse(loaded)]
    assert failed_checks(tmp_path, halves, loaded) == set()


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (swap_channels, IMAGES),
        (drop_a_block_of_the_image_tower, IMAGES),
        (gather_elsewhere, TEXTS),
        (see_what_comes_after, TEXTS),
        (shift_positions, TEXTS),
    ],
)
def test_a_fault_of_an_engine_is_caught(
    tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder, fault: Callable[[Any], None], caught: set[str]
) -> None:
    failed = failed_checks(tmp_path, engines, loaded, changed(loaded, fault))
    assert failed >= caught
    assert failed <= caught | {"served path: image cosine", BOTH}


def test_a_wrong_mean_is_caught(tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder) -> None:
    other = loaded.preprocessing.model_copy(update={"mean": (0.3, 0.3, 0.3)})
    assert failed_checks(tmp_path, engines, loaded, staged_as=replace(loaded, preprocessing=other)) >= IMAGES


def test_a_crop_off_by_one_is_caught(
    tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> np.ndarray:
        return np.roll(resize(image, preprocessing, original), 1, axis=1)

    monkeypatch.setattr(export.served, "resize", off_by_one)
    assert failed_checks(tmp_path, engines, loaded) >= PIXELS


def test_a_network_that_does_not_look_or_read_is_not_verified(
    tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine and reference agree perfectly, and it means nothing."""
    same = np.full((1, 24), 24**-0.5, np.float32)
    monkeypatch.setattr(export.verify_dual_encoder, "ask", lambda infer, rows, batch=1: same.repeat(len(rows), 0))
    monkeypatch.setattr(type(loaded.network), "encode_images", lambda self, images: torch.from_numpy(same).repeat(len(images), 1))
    monkeypatch.setattr(type(loaded.network), "encode_texts", lambda self, ids: torch.from_numpy(same).repeat(len(ids), 1))
    failed = failed_checks(tmp_path, engines, loaded)
    assert failed == {f"sees {what}: cosine" for what in ("swapped channels", "another image", "a text cut off", "another text")}


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_another_cleaning_is_caught(tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder, clean: Any) -> None:
    staged_as = replace(loaded, vocabulary=replace(loaded.vocabulary, clean=clean))
    assert failed_checks(tmp_path, engines, loaded, staged_as=staged_as) >= {IDS}


def test_a_text_cut_too_early_is_caught(
    tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PhraseTokenizer.encode

    def early(tokenizer: PhraseTokenizer, phrase: str) -> Phrase:
        found = encode(tokenizer, phrase)
        ids = found.input_ids.copy()
        ids[6:] = 0
        ids[5] = 49407
        return replace(found, input_ids=ids)

    monkeypatch.setattr(PhraseTokenizer, "encode", early)
    assert failed_checks(tmp_path, engines, loaded) >= {IDS, *TEXTS}


def test_a_cut_that_is_not_told_is_caught(
    tmp_path: Path, engines: list[Engine], loaded: LoadedDualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PhraseTokenizer.encode
    monkeypatch.setattr(PhraseTokenizer, "encode", lambda tokenizer, phrase: replace(encode(tokenizer, phrase), truncated=False))
    assert failed_checks(tmp_path, engines, loaded) == {IDS}
