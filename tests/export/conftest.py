"""The small engine that the tests of the later stages share: exporting it takes longer than what they test."""

import pytest

from export.spec import Engine, Loaded, Reference
from tests.export.small import make_engine, make_loaded


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    return make_loaded()


@pytest.fixture(scope="session")
def made(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Reference]:
    """An ONNX engine and the reference that it agrees with."""
    return make_engine(loaded, tmp_path_factory.mktemp("engine"))
