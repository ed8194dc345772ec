"""A gateway on the embedded engine and a small real repository, in this process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.repository import make_repository

MakeClient = Callable[..., TestClient]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


@pytest.fixture
def make_client(repository: Path) -> Iterator[MakeClient]:
    """`make_client(**settings)`: a started gateway on `repository`."""
    with ExitStack() as stack:

        def make(**settings: Any) -> TestClient:
            options = {"repository": repository, "default_classify": "colours", "repository_poll": 0} | settings
            app = create_app(Settings(_env_file=None, **options))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()
