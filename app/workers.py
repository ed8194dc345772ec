"""Several processes behind one address: a parent that starts, watches and replaces them (`vitrine serve --workers N`).

On Linux every worker has a listening socket of its own on the same port, so that the kernel spreads the connections; elsewhere they
share one. The parent keeps the sockets open: what arrives for a worker that has died waits for the one that takes its place.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from app import logs
from app.settings import ModelSettings, Settings, warn_if_open

log = logging.getLogger("vitrine.workers")

RESTART_SECONDS = 1.0  # between two starts of one worker at least
GRACE_SECONDS = 5.0  # for ending, after the last request had its time
MEMORY_FILES = Path("/dev/shm")  # noqa: S108 -- metrics are written with every request: memory, where there is a file system of it

SHARED = (
    *("max_requests", "max_connections", "max_queue", "max_body_bytes_in_flight", "max_pixels_in_flight"),
    *("instances", "compute_threads", "triton_concurrency", "chat_streams", "chat_queue"),
)
ROOM_FOR_ONE = {"max_body_bytes_in_flight": "max_body_bytes", "max_pixels_in_flight": "max_image_pixels"}


def share(settings: Settings) -> Settings:
    """What one of `settings.workers` gets: its part of every limit, rounded down, at least 1.

    Memory for bodies and for pixels is never less than one body and one image may have, where it is not so for one process already.
    """
    parts: dict[str, Any] = {}
    for name in SHARED:
        whole = getattr(settings, name)
        least = min(whole, getattr(settings, ROOM_FOR_ONE[name])) if name in ROOM_FOR_ONE else 1
        parts[name] = max(least, whole // settings.workers)
    parts["models"] = {name: _share_instances(model, settings.workers) for name, model in settings.models.items()}
    return settings.model_copy(update=parts)


def _share_instances(model: ModelSettings, workers: int) -> ModelSettings:
    return model if model.instances is None else model.model_copy(update={"instances": max(1, model.instances // workers)})


def serve(settings: Settings, ready: Callable[[], None] = lambda: None) -> None:
    """Run `settings.workers` gateways until SIGINT or SIGTERM. `ready` is called once, when the default models of all answer."""
    logs.configure(settings.log_level, settings.log_format)
    warn_if_open(settings)
    try:
        listeners = bind(settings.host, settings.port, settings.workers)
    except OSError as error:
        log.error("%s", error)
        sys.exit(1)
    with metrics_directory() as directory, _directory_in_memory("shared") as shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory  # the workers inherit it before they import what reads it
        outcome = Supervisor(share(settings), listeners, ready, Path(shared)).run()
    sys.exit(max(0, outcome))


def metrics_directory() -> "TemporaryDirectory[str]":
    """A fresh directory for the metrics of all workers, gone when its block ends."""
    return _directory_in_memory("metrics")


def _directory_in_memory(purpose: str) -> "TemporaryDirectory[str]":
    memory = MEMORY_FILES if os.access(MEMORY_FILES, os.W_OK) else None
    return TemporaryDirectory(prefix=f"vitrine-{purpose}-", dir=memory, ignore_cleanup_errors=True)


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets on one address, not listening yet.

    Raises:
        OSError: the address is taken, or not one of this machine.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind) as probe:  # sockets that share a port would share it with another gateway's, too
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        address = probe.getsockname()

    def one() -> socket.socket:
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
        return bound

    return [one() for _ in range(count)] if sys.platform == "linux" else [one()] * count


@dataclass
class Worker:
    """One process; it has `begun` once it listens and has tried its default models, and is `ready` when all of them answer."""

    process: SpawnProcess
    connection: Connection
    listener: socket.socket
    started: float = field(default_factory=time.monotonic)
    begun: bool = False
    ready: bool = False


class Supervisor:
    """Starts a worker for every listener, replaces those that die, and ends them all on a signal."""

    def __init__(self, settings: Settings, listeners: Sequence[socket.socket], ready: Callable[[], None], shared: Path) -> None:
        """`settings` are those of one worker, `shared` is a directory for what all of them know together."""
        self.settings = settings
        self.listeners = listeners
        self.shared = shared
        self.workers: list[Worker] = []
        self._ready = ready
        self._announced = False
        self._signals, self._signalled = socket.socketpair()

    def run(self) -> int:
        """Watch until a signal came, and give its number, negative; or the exit code of a worker that could not start.

        A worker that ends by itself before all have begun once would do so again for ever; later ones are replaced.
        """
        self._signalled.setblocking(False)
        signal.set_wakeup_fd(self._signalled.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        self.workers = [self._start(listener) for listener in self.listeners]
        outcome = 0
        while not outcome:
            outcome = self._watch()
        self._stop()
        return outcome

    def _start(self, listener: socket.socket) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(self.settings, listener, theirs, self.shared))
        process.start()
        theirs.close()
        log.info("worker %s started", process.pid)
        return Worker(process, ours, listener)

    def _watch(self) -> int:
        """Wait for the next event and deal with it; gives what `run` ends with, or 0."""
        happened = wait([self._signals, *(worker.process.sentinel for worker in self.workers), *self._silent()])
        if self._signals in happened:
            return -self._signals.recv(1)[0]
        for index, worker in enumerate(self.workers):
            if worker.process.sentinel in happened:
                code = self._bury(worker)
                if code > 0 and not self._announced:
                    return code
                time.sleep(max(0.0, worker.started + RESTART_SECONDS - time.monotonic()))
                self.workers[index] = self._start(worker.listener)
            elif worker.connection in happened:
                with suppress(EOFError):  # it has just died
                    worker.ready, worker.begun = bool(worker.connection.recv()), True
        if not self._announced and all(worker.begun for worker in self.workers):
            self._announced = True
            if all(worker.ready for worker in self.workers):
                self._ready()
        return 0

    def _silent(self) -> list[Connection]:
        """The ends of those that have not said yet how they began."""
        return [worker.connection for worker in self.workers if not worker.begun]

    def _bury(self, worker: Worker) -> int:
        """Take leave of a process that has ended: what only a living one has must not stay in the metrics. Gives its exit code."""
        worker.process.join()
        worker.connection.close()
        mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]
        log.error("worker %s ended with exit code %s", worker.process.pid, worker.process.exitcode)
        return worker.process.exitcode or 0

    def _stop(self) -> None:
        """End the workers, giving requests in flight their time; a second signal, or the end of that time, kills."""
        for listener in self.listeners:
            listener.close()
        for worker in self.workers:
            worker.process.terminate()
        until = time.monotonic() + self.settings.shutdown_delay + self.settings.shutdown_timeout + GRACE_SECONDS
        living = {worker.process.sentinel: worker.process for worker in self.workers}
        while living:
            happened = wait([self._signals, *living], timeout=max(0.0, until - time.monotonic()))
            if not happened or self._signals in happened:
                log.warning("killing the workers %s", ", ".join(str(process.pid) for process in living.values()))
                for process in living.values():
                    process.kill()
                break
            living = {sentinel: process for sentinel, process in living.items() if sentinel not in happened}
        for worker in self.workers:
            worker.process.join()


def work(settings: Settings, listener: socket.socket, parent: Connection, shared: Path) -> None:
    """The whole life of one worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everyone; the parent says when to end
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from app.main import serve as serve_alone  # noqa: PLC0415 -- the parent has no use for onnxruntime

    serve_alone(settings, begun=parent.send, listener=listener, shared=shared)


def _end_with(parent: Connection) -> None:
    """A worker does not outlive its parent, however that ended."""
    try:
        parent.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
