"""The small engines that the tests of the later stages share: exporting them takes longer than what they test."""

from collections.abc import Callable
from functools import cache

import pytest

from export.fuse_detector import fuse_detector
from export.load import load
from export.spec import Engine, Fused, Loaded, LoadedDetector, Reference
from export.to_onnx import to_onnx
from tests.export.detectors import DETECTORS
from tests.export.small import make_engine, make_loaded


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    return make_loaded()


@pytest.fixture(scope="session")
def made(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Reference]:
    """An ONNX engine and the reference that it agrees with."""
    return make_engine(loaded, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def narrow_detectors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[LoadedDetector, Fused, Engine]]:
    """Gives a narrow detector by the name of its family, exported when it is first asked for."""

    @cache
    def make(name: str) -> tuple[LoadedDetector, Fused, Engine]:
        directory = tmp_path_factory.mktemp(name)
        loaded = load(DETECTORS[name].request(directory))
        assert isinstance(loaded, LoadedDetector)
        fused = fuse_detector(loaded)
        return loaded, fused, to_onnx(fused, directory / "model.onnx", "fp32")

    return make


@pytest.fixture(scope="session")
def made_detector(narrow_detectors: Callable[[str], tuple[LoadedDetector, Fused, Engine]]) -> tuple[LoadedDetector, Fused, Engine]:
    """A narrow ViDT+, which has everything that a detector can have: masks, and padding that it masks."""
    return narrow_detectors("vidt_plus")


@pytest.fixture(scope="session")
def made_proposing(narrow_detectors: Callable[[str], tuple[LoadedDetector, Fused, Engine]]) -> tuple[LoadedDetector, Fused, Engine]:
    """A narrow RT-DETR, whose queries start from places that it chooses."""
    return narrow_detectors("rt_detr")
