"""The real Triton of `make .triton`, for the tests that need one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.local_triton import LocalTriton, LocalTritonError, Ports, find, free_ports

ROOT = Path(__file__).resolve().parent.parent


def require() -> Path:
    """The Triton's home; without one the test is skipped, or fails where VITRINE_REQUIRE says that it must be there."""
    try:
        return find(ROOT / ".triton")
    except LocalTritonError as error:
        if "triton" in os.environ.get("VITRINE_REQUIRE", "").split(","):
            pytest.fail(f"VITRINE_REQUIRE asks for Triton: {error}")
        pytest.skip(str(error))


@contextmanager
def serve(repository: Path, ports: Ports | None = None) -> Iterator[LocalTriton]:
    """A server of `repository` on free ports, ready inside; its log is `triton.log` beside the repository, without a traceback."""
    file = repository.parent / "triton.log"
    with file.open("ab") as log, LocalTriton(repository, ports or free_ports(), require(), log) as server:
        yield server
    assert b"Traceback" not in file.read_bytes(), file.read_text(errors="replace")
