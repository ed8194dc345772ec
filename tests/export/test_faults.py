"""Verification must be able to fail: each deliberate fault of an engine or of the served path is caught, and named."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import export.served
import export.verify
from app.decode import ImageInfo, OpenedImage, decode
from app.manifest import Entry, Preprocessing
from app.resize import resize
from export.runner import Infer, open_engine
from export.spec import Engine, Loaded, Reference, VerificationError
from export.stage import stage
from export.verify import verify_classifier
from tests.export.small import PREPROCESSING, make_engine, make_request

Made = tuple[Engine, Reference]


class Swapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.flip(1))


def without_a_block(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    network.blocks[1] = nn.Identity()
    return network


def constant(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        network.head.weight.zero_()
    return network


def failed_checks(directory: Path, made: Made, loaded: Loaded) -> set[str]:
    """What verification says of this engine against this reference; nothing when it passes."""
    with stage([made[0]], loaded, make_request(directory)) as (staged,):
        try:
            verify_classifier(staged, made[1])
        except VerificationError as error:
            return {check.name for check in error.verification.checks if check.required and not check.passed}
    return set()


def test_the_control_has_no_fault(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    assert failed_checks(tmp_path, made, loaded) == set()


@pytest.mark.parametrize("fault", [Swapped, without_a_block], ids=["channels swapped", "one block dropped"])
def test_a_fault_of_the_network_is_caught(
    tmp_path: Path, made: Made, loaded: Loaded, fault: Callable[[nn.Module], nn.Module]
) -> None:
    assert isinstance(loaded.network, nn.Module)
    engine, _ = make_engine(replace(loaded, network=fault(loaded.network).eval()), tmp_path)
    failed = failed_checks(tmp_path, (engine, made[1]), loaded)
    assert {"engine, batch 1: logits", "engine, batch 3: logits", "engine, batch 8: logits", "served path: logits"} <= failed
    assert not any(name.startswith("pixels") for name in failed)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.25, 0.25, 0.25)}, {"scale": 1 / 256}, {"mean": (0.406, 0.456, 0.485)}],
    ids=lambda wrong: str(next(iter(wrong))),
)
def test_a_wrong_normalisation_is_caught(tmp_path: Path, made: Made, loaded: Loaded, wrong: dict) -> None:
    engine, _ = make_engine(replace(loaded, preprocessing=PREPROCESSING.model_copy(update=wrong)), tmp_path)
    assert {"engine, batch 1: logits", "engine, batch 8: probabilities"} <= failed_checks(tmp_path, (engine, made[1]), loaded)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1)], ids=["down", "across"])
def test_a_crop_off_by_one_is_caught(
    tmp_path: Path, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, shift: tuple[int, int]
) -> None:
    def off_by_one(image: Image.Image, preprocessing: Preprocessing, original: tuple[int, int]) -> np.ndarray:
        larger = {"height": preprocessing.height + 4, "width": preprocessing.width + 4}
        frame = resize(image, preprocessing.model_copy(update=larger), original)
        down, across = shift
        return frame[2 + down :, 2 + across :][: preprocessing.height, : preprocessing.width]

    monkeypatch.setattr(export.served, "resize", off_by_one)
    assert "pixels: off by more than one level" in failed_checks(tmp_path, made, loaded)


def test_the_shifting_resize_is_right_without_a_shift() -> None:
    """The fault above is the shift alone: the same cut without it gives the frame."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8))
    larger = resize(image, PREPROCESSING.model_copy(update={"height": 36, "width": 36}), image.size)
    difference = np.abs(larger[2:-2, 2:-2].astype(int) - resize(image, PREPROCESSING, image.size))
    assert difference.max() <= 1


def test_a_black_image_is_caught(tmp_path: Path, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
        image, info = decode(opened)
        return Image.new("RGB", image.size), info

    monkeypatch.setattr(export.served, "decode", black)
    failed = failed_checks(tmp_path, made, loaded)
    assert {"pixels: off by more than one level", "served path: logits", "sees another image: logits"} <= failed


def test_an_image_left_lying_on_its_side_is_caught(
    tmp_path: Path, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unturned(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
        return decode(replace(opened, orientation=1))

    monkeypatch.setattr(export.served, "decode", unturned)
    assert "pixels: off by more than one level" in failed_checks(tmp_path, made, loaded)


def test_a_network_that_says_the_same_of_every_image_is_not_verified(tmp_path: Path, loaded: Loaded) -> None:
    """Engine and reference agree perfectly, and it means nothing."""
    assert isinstance(loaded.network, nn.Module)
    dull = replace(loaded, network=constant(loaded.network).eval())
    failed = failed_checks(tmp_path, make_engine(dull, tmp_path), dull)
    assert {"sees a black image: logits", "sees swapped channels: logits", "sees another image: logits"} <= failed


def test_a_network_blind_to_colour_order_is_not_verified(tmp_path: Path, loaded: Loaded) -> None:
    class Grey(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images.mean(1, keepdim=True).expand(-1, 3, -1, -1))

    assert isinstance(loaded.network, nn.Module)
    same = PREPROCESSING.model_copy(update={"mean": (0.5,) * 3, "std": (0.25,) * 3})
    grey = replace(loaded, network=Grey(loaded.network).eval(), preprocessing=same)
    assert failed_checks(tmp_path, make_engine(grey, tmp_path), grey) == {"sees swapped channels: logits"}


def test_rows_that_depend_on_their_batch_are_caught(
    tmp_path: Path, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose rows leak into one another is right alone and wrong in company."""

    @contextmanager
    def leaking(entry: Entry) -> Iterator[Infer]:
        with open_engine(entry) as infer:
            yield lambda images: np.repeat(infer(images[:1]), len(images), axis=0)

    monkeypatch.setattr(export.verify, "open_engine", leaking)
    failed = failed_checks(tmp_path, made, loaded)
    assert {"alone and in a batch of 3: logits", "alone and in a batch of 8: logits", "engine, batch 8: logits"} <= failed
    assert "engine, batch 1: logits" not in failed
