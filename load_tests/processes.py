"""A server as a tree of processes: started, waited for, its processor time and memory read, and stopped whole.

Every process of a server carries a mark in its environment, which children inherit, so that those which left the tree (Ray's,
daemons of a supervisor) are counted and ended too.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from load_tests.wrk import Body

MARK = "VITRINE_BENCH_SERVER"
READY_SECONDS = 60.0
STOP_SECONDS = 15.0
GONE_SECONDS = 5.0  # after a kill
SETTLE_SECONDS = 30.0
SETTLE_STEP = 0.3
IDLE = 0.3  # of one core; Ray's own processes never rest


class ServerError(Exception):
    """The server did not start or gave a wrong answer; the message ends with its log."""


@dataclass(frozen=True)
class Usage:
    """Processor seconds since each process began, and proportional resident bytes, of all processes together."""

    cpu: float
    memory: int


def unwind_on_sigterm() -> None:
    """Let a driver that is told to end leave its `with` blocks, so that its server ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Server:
    """One server under test: it runs inside the `with` block, and without the settings of Vitrine in this shell."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path) -> None:
        self.command = list(command)
        self.mark = secrets.token_hex(8)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VITRINE_")}
        self.environment = {**inherited, **environment, MARK: self.mark}
        self.directory = directory
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, float] = {}

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603
                self.command, env=self.environment, cwd=self.directory, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def wait(self, url: str, sent: Body | None = None) -> bytes:
        """Send `sent` (GET without it) until it is answered with 200, and give that answer.

        Raises:
            ServerError: the server ended, or there is no right answer in time.
        """
        assert self.process is not None
        request = urllib.request.Request(url)  # noqa: S310
        if sent is not None:
            request = urllib.request.Request(url, sent.data, {"Content-Type": sent.content_type, "Accept": sent.accept})  # noqa: S310
        until = time.monotonic() + READY_SECONDS
        reason = "no answer"
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ServerError(f"It ended with status {self.process.returncode}.\n{self._tail()}")
            try:
                with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                    answer: bytes = response.read()
                    return answer
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read(500)!r}"
            except OSError as error:
                reason = str(error)
            time.sleep(0.1)
        raise ServerError(f"No right answer within {READY_SECONDS:g} s: {reason}\n{self._tail()}")

    def settle(self) -> None:
        """Wait until the work that a client left behind is done; else it would fall into the next measurement."""
        until = time.monotonic() + SETTLE_SECONDS
        before = self.usage().cpu
        while time.monotonic() < until:
            time.sleep(SETTLE_STEP)
            after = self.usage().cpu
            if after - before < IDLE * SETTLE_STEP:
                return
            before = after

    def usage(self) -> Usage:
        memory = 0
        for process in self._processes():
            try:
                times = process.cpu_times()
                memory += process.memory_full_info().pss
            except psutil.Error:
                continue
            self._seen[process.pid] = times.user + times.system
        cpu = sum(self._seen.values())  # a process that has ended keeps the time it was last seen with
        return Usage(cpu, memory)

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes()]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process is not None
        processes = self._processes()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in {*processes, *self._processes()}:
            try:
                process.kill()
            except psutil.Error:
                continue
        until = time.monotonic() + GONE_SECONDS
        while any(map(_lives, processes)) and time.monotonic() < until:
            time.sleep(0.02)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _lives(process: psutil.Process) -> bool:
    """A zombie does not: nothing of it is left but that its parent, often the system's first process, has not asked."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
