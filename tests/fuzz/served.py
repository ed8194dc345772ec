"""The campaigns against a real gateway: the hostile is refused in time and within memory, and the next good request is answered."""

import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import numpy as np
import psutil

from load_tests.processes import Server
from load_tests.servers import free_port, vitrine
from tests.chat_repository import add_chat
from tests.detector_repository import add_detector, add_grounder
from tests.dual_repository import add_dual_encoder
from tests.fuzz import files, requests
from tests.fuzz.campaign import REFUSED_SECONDS, Campaign, allowed_seconds
from tests.fuzz.mutation import mutate
from tests.repository import make_repository
from tests.tokenizer_repository import add_tokenizer

ANSWER_SECONDS = 40  # the gateway's own deadline is 30
AT_ONCE = 1.0  # seconds for the good request that follows
BYTES_PER_PIXEL = 16  # above what the gateway takes when it is idle, for an image of the largest size; see docs/reliability.md
ROOM = 300 * 2**20  # for bodies, their JSON, and what the allocator keeps
GOOD = requests.http("/v1/classify", requests.IMAGE)
EVERY = 20  # of the changed requests, one is followed by a good one
DEFAULTS = {
    "VITRINE_DEFAULT_CLASSIFY": "colours",
    "VITRINE_DEFAULT_EMBED": "colour-clip",
    "VITRINE_DEFAULT_CHAT": "counter",
    "VITRINE_DEFAULT_TOKENIZER": "greys",
}


@dataclass(frozen=True)
class Answer:
    """`status` is None where the connection closed without one; `cpu` are processor seconds of the gateway, `wall` seconds."""

    status: int | None
    body: bytes
    cpu: float
    wall: float


class Watched:
    """A gateway whose processor time and memory are watched while it is asked."""

    def __init__(self, server: Server, port: int) -> None:
        assert server.process is not None
        self.port = port
        self.log = server.log
        self._process = psutil.Process(server.process.pid)
        self.idle = self.memory

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(self._process.memory_info().rss)

    @property
    def peak(self) -> int:
        """The most resident bytes so far, by the kernel's count."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

    @property
    def cpu(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def ask(self, content: bytes, *, half_close: bool = False) -> Answer:
        """Write `content` to a connection of its own and read the answer; `half_close` says that nothing more will come."""
        cpu, started = self.cpu, time.monotonic()
        status, body = None, b""
        with socket.create_connection(("127.0.0.1", self.port), ANSWER_SECONDS) as connection:
            try:
                connection.sendall(content)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # refused before it was all there: its answer is waiting
            try:
                response = HTTPResponse(connection, method="POST")
                response.begin()
                status = response.status
                body = response.read()
            except TimeoutError:
                raise
            except (HTTPException, OSError):
                pass
        return Answer(status, body, self.cpu - cpu, time.monotonic() - started)


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """A gateway with a small model of every task, as it comes but for its defaults."""
    repository = make_repository(directory / "repository")
    box = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)
    add_chat(repository)
    add_dual_encoder(repository)
    add_tokenizer(repository)
    add_detector(repository, box, [0.9], [0])
    add_grounder(repository, box)
    port = free_port()
    settings = {"VITRINE_REPOSITORY": str(repository), **DEFAULTS}
    with vitrine(port, 1, directory / "gateway.log", settings) as server:
        server.wait(f"http://127.0.0.1:{port}/readyz")
        gateway = Watched(server, port)
        for path, document in requests.documents().values():
            gateway.ask(requests.http(path, json.dumps(document).encode(), requests.JSON))
        gateway.idle = gateway.memory
        yield gateway


def send_files(campaign: Campaign, gateway: Watched, side: int) -> None:
    """Every hostile file once, those of honest structure with `side` x `side` pixels."""
    for file in files.hostile(side):
        answer = _ask(campaign, gateway, file.name, requests.http("/v1/classify", file.data), file.statuses)
        if answer is None:
            continue
        refused = answer.status != 200
        decoded = not refused or b"undecodable_image" in answer.body
        limit = allowed_seconds(file.pixels, len(file.data)) if decoded else REFUSED_SECONDS
        if answer.cpu > limit:
            campaign.fault(f"{file.name}: {answer.status} took {answer.cpu:.2f} s of processor time; {limit:.2f} s are allowed")
        _ask_good(campaign, gateway, file.name)
    _check_memory(campaign, gateway)


def send_requests(campaign: Campaign, gateway: Watched, **_: object) -> None:
    """Every hostile request once."""
    for request in requests.hostile():
        answer = _ask(campaign, gateway, request.name, request.content, request.statuses)
        if answer is not None and answer.cpu > REFUSED_SECONDS:
            campaign.fault(f"{request.name}: {answer.status} took {answer.cpu:.2f} s of processor time")
        _ask_good(campaign, gateway, request.name)
    _check_memory(campaign, gateway)


def send_changed(campaign: Campaign, gateway: Watched, **_: object) -> None:
    """Good requests of every route, changed: files, documents, forms, or the request itself to its last byte."""
    valid = list(files.valid().values())
    good = [(path, json.dumps(document).encode()) for path, document in requests.documents().values()]
    for number, chance in campaign.inputs():
        content, whole = _changed(chance, valid, good)
        answer = _ask(campaign, gateway, str(number), content, None, half_close=not whole)
        if answer is not None and answer.cpu > REFUSED_SECONDS:
            campaign.fault(f"{number}: {answer.status} took {answer.cpu:.2f} s of processor time", content)
        if number % EVERY == 0:
            _ask_good(campaign, gateway, str(number))
    _check_memory(campaign, gateway)


def _changed(chance: random.Random, valid: list[bytes], good: list[tuple[str, bytes]]) -> tuple[bytes, bool]:
    """A request, and whether its length is right; behind one that may want more the connection is half closed."""
    kind = chance.choice(("file", "document", "form", "request", "text in a document"))
    path, document = chance.choice(good)
    if kind == "request":
        return mutate(requests.http(path, document, requests.JSON), chance, valid), False
    if kind == "file":
        place = chance.choice(("/v1/classify", "/v1/tokenize", "/v1/detect"))
        return requests.http(place, mutate(chance.choice(valid), chance, valid)), True
    if kind == "document":
        return requests.http(path, mutate(document, chance, [each for _, each in good]), requests.JSON), True
    if kind == "form":
        form = requests.multipart(requests.part("image", chance.choice(valid), "a"), requests.part("top_k", b"3"))
        return requests.http("/v1/classify", mutate(form, chance, valid), requests.FORM), True
    text = mutate(document, chance, valid).decode("latin-1")
    odd = json.loads(document) | {
        chance.choice(("image", "input", "model", "messages", "tokens", "labels", "phrase", "texts")): text
    }
    return requests.http(path, json.dumps(odd).encode(), requests.JSON), True


def _ask(
    campaign: Campaign,
    gateway: Watched,
    name: str,
    content: bytes,
    statuses: frozenset[int | None] | None,
    *,
    half_close: bool = False,
) -> Answer | None:
    """The answer, counted; without `statuses` every one below 500 will do, and none at all."""
    try:
        answer = gateway.ask(content, half_close=half_close)
    except (TimeoutError, OSError) as error:
        campaign.fault(f"{name}: {type(error).__name__}: {error}", content)
        return None
    campaign.count("closed" if answer.status is None else str(answer.status), answer.cpu, name)
    server_error = answer.status is not None and answer.status >= 500
    if server_error or (statuses is not None and answer.status not in statuses):
        wanted = "" if statuses is None else f" instead of {sorted(map(str, statuses))}"
        campaign.fault(f"{name}: {answer.status}{wanted}: {answer.body[:300]!r}", content[: 2**20])
    return answer


def _ask_good(campaign: Campaign, gateway: Watched, after: str) -> None:
    """A connection of its own, a good image, its answer."""
    answer = gateway.ask(GOOD)
    campaign.good += 1
    if answer.status != 200 or answer.wall > AT_ONCE:
        campaign.fault(f"the good request after {after}: {answer.status} in {answer.wall:.2f} s: {answer.body[:200]!r}")


def _check_memory(campaign: Campaign, gateway: Watched) -> None:
    ceiling = gateway.idle + BYTES_PER_PIXEL * 64_000_000 + ROOM
    told = (
        f"memory {gateway.idle / 2**20:.0f} MB idle, {gateway.peak / 2**20:.0f} MB at its peak, {gateway.memory / 2**20:.0f} MB now"
    )
    campaign.notes.append(f"{campaign.good} good requests in between; {told}")
    if gateway.peak > ceiling:
        campaign.fault(f"{told}; the ceiling is {ceiling / 2**20:.0f} MB")
