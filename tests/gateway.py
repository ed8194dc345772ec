"""A gateway as a process of its own, for the tests that speak HTTP to one."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.client import Client

VITRINE = Path(sys.executable).with_name("vitrine")
READY_SECONDS = 60


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(**variables: object) -> dict[str, str]:
    """This process's environment with only these VITRINE_ variables: `port=1` is VITRINE_PORT."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VITRINE_")}
    return inherited | {f"VITRINE_{name.upper()}": str(value) for name, value in variables.items()}


@contextmanager
def gateway(repository: Path, *, port: int | None = None, **settings: object) -> Iterator[str]:
    """The address of `vitrine serve` on `repository`, ready inside; its log is `gateway.log` beside the repository."""
    port = port or free_port()
    variables = environment(repository=repository, port=port, **settings)
    with (repository.parent / "gateway.log").open("ab") as log:
        process = subprocess.Popen([VITRINE, "serve"], env=variables, cwd=repository.parent, stdout=log, stderr=subprocess.STDOUT)
    try:
        with Client(f"http://127.0.0.1:{port}", timeout=5) as client:
            until = time.monotonic() + READY_SECONDS
            while not client.ready():
                assert process.poll() is None, (repository.parent / "gateway.log").read_text()
                assert time.monotonic() < until, (repository.parent / "gateway.log").read_text()
                time.sleep(0.02)
            yield client.url
    finally:
        process.terminate()
        process.wait(30)
