"""Verification of a detector must be able to fail: each deliberate fault of an engine or of the served path is caught, by name.

The engine is made once. A fault of its network is put into the reference instead, which comes to the same: they differ by it.
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
import export.verify_detector
from app.manifest import Preprocessing
from app.resize import content_size, resize
from export.spec import Engine, Fused, LoadedDetector, VerificationError
from export.stage import stage
from export.verify_detector import verify_detector
from tests.export.detectors import DETECTORS

FAMILY = DETECTORS["vidt_plus"]
Made = tuple[LoadedDetector, Fused, Engine]


def failed_checks(directory: Path, made_detector: Made, **changes: Any) -> set[str]:
    """What verification says of the engine; `changes` are of what is told of its network. Nothing when it passes."""
    loaded, fused, engine = made_detector
    loaded = replace(loaded, **changes)
    with stage([engine], loaded, FAMILY.request(directory)) as (staged,):
        try:
            verify_detector(staged, loaded.network, fused.inner)
        except VerificationError as error:
            return {check.name for check in error.verification.checks if check.required and not check.passed}
    return set()


def changed(loaded: LoadedDetector, change: Callable[[Any], None]) -> Any:
    network = copy.deepcopy(loaded.network)
    with torch.no_grad():
        change(network)
    return network.eval()


def swap_channels(network: Any) -> None:
    network.backbone.patch_embed.proj.weight.copy_(network.backbone.patch_embed.proj.weight.flip(1))


def drop_a_block(network: Any) -> None:
    stage_ = network.backbone.layers[1]
    stage_.blocks = nn.ModuleList(stage_.blocks[:1])


def drop_a_decoder_layer(network: Any) -> None:
    decoder = network.transformer.decoder
    decoder.layers, network.bbox_embed = decoder.layers[:1], network.bbox_embed[:2]


def forget_the_shift(network: Any) -> None:
    for block in network.backbone.layers[1].blocks:
        block.shift = 0


def test_the_control_has_no_fault(tmp_path: Path, made_detector: Made) -> None:
    assert failed_checks(tmp_path, made_detector) == set()


@pytest.mark.parametrize("fault", [swap_channels, drop_a_block, drop_a_decoder_layer, forget_the_shift])
def test_a_faulty_network_is_seen_query_by_query(tmp_path: Path, made_detector: Made, fault: Callable[[Any], None]) -> None:
    failed = failed_checks(tmp_path, made_detector, network=changed(made_detector[0], fault))
    assert {f"engine, batch {batch}: query boxes" for batch in (1, 3, 8)} <= failed
    assert {f"engine, batch {batch}: query scores" for batch in (1, 3, 8)} <= failed
    assert "engine, batch 1: row boxes" in failed


def propose_otherwise(network: Any) -> None:
    network.library.model.enc_score_head.weight.copy_(network.library.model.enc_score_head.weight.roll(1, 1))


def propose_a_little_otherwise(network: Any) -> None:
    """The same places are chosen, in the same order."""
    network.library.model.enc_score_head.weight.mul_(1.01)


def drop_a_layer_of_queries(network: Any) -> None:
    decoder = network.library.model.decoder
    decoder.layers[0] = decoder.layers[1]


def test_a_detector_that_proposes_has_no_fault(tmp_path: Path, made_proposing: Made) -> None:
    assert failed_checks(tmp_path, made_proposing) == set()


@pytest.mark.parametrize("fault", [propose_otherwise, propose_a_little_otherwise])
def test_wrong_proposals_are_seen_before_any_is_chosen(tmp_path: Path, made_proposing: Made, fault: Callable[[Any], None]) -> None:
    failed = failed_checks(tmp_path, made_proposing, network=changed(made_proposing[0], fault))
    assert {f"engine, batch {batch}: proposals" for batch in (1, 3, 8)} <= failed
    assert ("engine, batch 1: starts in common" in failed) == (fault is propose_otherwise)
    assert "engine, batch 1: query boxes" not in failed  # from the same places, the queries are right


def test_wrong_queries_are_seen_where_proposals_are_right(tmp_path: Path, made_proposing: Made) -> None:
    failed = failed_checks(tmp_path, made_proposing, network=changed(made_proposing[0], drop_a_layer_of_queries))
    assert {"engine, batch 1: query boxes", "engine, batch 3: query scores", "engine, batch 8: row boxes"} <= failed
    assert not any("proposals" in name for name in failed)


@pytest.mark.parametrize("fault", [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.3, 0.3, 0.3)}, {"scale": 1 / 256}], ids=str)
def test_wrong_normalisation_is_seen(tmp_path: Path, made_detector: Made, fault: dict[str, Any]) -> None:
    failed = failed_checks(tmp_path, made_detector, preprocessing=made_detector[0].preprocessing.model_copy(update=fault))
    assert {"engine, batch 1: query boxes", "engine, batch 1: query scores"} <= failed


def shift_by_one(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> Any:
    return np.roll(resize(image, preprocessing, original), 1, axis=1)


def fit_a_pixel_too_small(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> Any:
    smaller = preprocessing.model_copy(update={"height": preprocessing.height - 1, "width": preprocessing.width - 1})
    return np.pad(resize(image, smaller, original), ((0, 1), (0, 1), (0, 0)))


def show_black(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> Any:
    return np.zeros((preprocessing.height, preprocessing.width, 3), np.uint8)


@pytest.mark.parametrize("fault", [shift_by_one, fit_a_pixel_too_small, show_black])
def test_a_wrong_frame_is_seen(
    tmp_path: Path, made_detector: Made, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]
) -> None:
    monkeypatch.setattr(export.served, "resize", fault)
    assert "pixels: off by more than one level" in failed_checks(tmp_path, made_detector)


def test_a_black_image_is_seen_as_blindness(tmp_path: Path, made_detector: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.served, "resize", show_black)
    assert {"sees a black image: query boxes", "sees a black image: query scores"} <= failed_checks(tmp_path, made_detector)


def test_padding_that_begins_a_pixel_too_late_is_seen(tmp_path: Path, made_detector: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
        rows, columns = content_size(width, height, preprocessing)
        return rows + 1, columns + 1

    monkeypatch.setattr(export.verify_detector, "content_size", one_more)
    assert "content: largest difference" in failed_checks(tmp_path, made_detector)


def test_padding_that_is_looked_at_is_seen(tmp_path: Path, made_detector: Made) -> None:
    """The engine masks its padding; a reference that does not gives other answers."""

    def ignore_content(network: Any) -> None:
        decode, encode = network.decode, network.encode
        network.encode = lambda images, content: encode(images, None)
        network.decode = lambda features, frame, content: decode(features, frame, None)

    failed = failed_checks(tmp_path, made_detector, network=changed(made_detector[0], ignore_content))
    assert {"engine, batch 1: query boxes", "engine, batch 1: query scores"} <= failed
