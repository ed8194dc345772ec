"""The real Triton of `make .triton`, run beside the gateway without a container: found, started, waited for, stopped."""

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

HOME = Path(".triton")
HOST = "127.0.0.1"
READY_SECONDS = 120.0
STOP_SECONDS = 10


class LocalTritonError(Exception):
    """The local Triton cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Ports:
    """Triton's usual ones, but for HTTP, whose 8000 is the gateway's."""

    http: int = 8003
    grpc: int = 8001
    metrics: int = 8002


def free_ports() -> Ports:
    """Three ports that nothing listens on at this moment."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(3)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return Ports(*numbers)


def find(home: Path = HOME) -> Path:
    """The absolute path of a Triton that was built and has answered.

    Raises:
        LocalTritonError: there is none.
    """
    if not (home / "ready").is_file():
        raise LocalTritonError(f"There is no Triton at {home}; run `make .triton` to build it.")
    return home.resolve()


def command(home: Path, repository: Path, ports: Ports, shared_memory: str) -> list[str]:
    """The command line that serves `repository` on this machine alone.

    Models load on request and all of them at the start; one that cannot load keeps nothing else from being served.
    Their processes talk with the server through files in /dev/shm whose names begin with `shared_memory`.
    """
    return [
        str(home / "server/bin/tritonserver"),
        f"--model-repository={repository.resolve()}",
        f"--backend-directory={home / 'backends'}",
        f"--cache-directory={home / 'server/caches'}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--exit-on-error=false",
        "--strict-readiness=false",
        f"--exit-timeout-secs={STOP_SECONDS}",
        *(f"--{front}-address={HOST}" for front in ("http", "grpc", "metrics")),
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
    ]


def environment(home: Path, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`inherited`, so changed that the server finds its libraries and the Python of its models in `home` alone."""
    kept = {name: value for name, value in inherited.items() if name not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{home / 'venv/bin'}:{inherited.get('PATH', os.defpath)}"
    return {**kept, "LD_LIBRARY_PATH": str(home / "lib"), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


class LocalTriton:
    """One server process; as a context manager it is ready inside and gone after. Its log goes to `log`, by default to ours."""

    def __init__(self, repository: Path, ports: Ports, home: Path = HOME, log: IO[bytes] | None = None) -> None:
        """
        Raises:
            LocalTritonError: `repository` is no directory.
        """
        self.home = home.resolve()
        self.ports = ports
        self.repository = repository
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._shared_memory = f"vitrine_{os.getpid()}_{ports.grpc}_"
        if not repository.is_dir():
            raise LocalTritonError(f"There is no model repository at {repository}.")

    @property
    def url(self) -> str:
        """For `VITRINE_TRITON_URL`."""
        return f"{HOST}:{self.ports.grpc}"

    def start(self) -> None:
        """Start the process in a group of its own, so that a Ctrl-C at the terminal reaches it through `stop` alone."""
        self._end_models()
        self.process = subprocess.Popen(  # noqa: S603
            command(self.home, self.repository, self.ports, self._shared_memory),
            env=environment(self.home),
            stdout=self.log,
            stderr=subprocess.STDOUT if self.log else None,
            start_new_session=True,
        )

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until the server has loaded what it can and answers.

        Raises:
            LocalTritonError: it ended, or was not ready in time.
        """
        assert self.process is not None
        end = time.monotonic() + seconds
        while not self.answers():
            if self.process.poll() is not None:
                raise LocalTritonError(f"Triton ended with status {self.process.returncode} before it was ready; see its log.")
            if time.monotonic() > end:
                raise LocalTritonError(f"Triton was not ready within {seconds:g} s; see its log.")
            time.sleep(0.05)

    def answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.ports.http, timeout=1)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> int:
        """End the server, by force when it does not in time, and give its exit status.

        A killed server leaves the processes of its models, which may work on for ever, and the memory they shared with it.
        """
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._end_models()
        for file in Path("/dev/shm").glob(f"{self._shared_memory}*"):  # noqa: S108
            file.unlink(missing_ok=True)
        return self.process.returncode

    def __enter__(self) -> "LocalTriton":
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _end_models(self) -> None:
        """They are in the server's process group, which outlives it as long as one of them runs."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def run(repository: Path, http_port: int, grpc_port: int, metrics_port: int, home: Path = HOME) -> int:
    """Serve `repository` until the server ends or SIGINT or SIGTERM comes, and give its exit status.

    Raises:
        LocalTritonError: no Triton was built at `home`, there is no such repository, or the server does not get ready.
    """
    server = LocalTriton(repository, Ports(http_port, grpc_port, metrics_port), find(home))
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with server:
            print(f"Triton serves {repository} on {server.url}; the gateway uses it with VITRINE_BACKEND=triton", flush=True)
            assert server.process is not None
            return server.process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
