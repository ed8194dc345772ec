"""The gateway under test: its rate over HTTP, and its memory at the peak."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from load_tests.cache import cache
from load_tests.processes import Server
from load_tests.servers import free_port, vitrine
from load_tests.tokenizers.client import load
from load_tests.tokenizers.inside import BATCHES, PEAK_STEPS, Memory, peak, reset_peak
from load_tests.tokenizers.ways import Tokenizer, Way, batch, check, request
from load_tests.wrk import Body, Load

CLIENTS = 8
ANSWERS = 6 * CLIENTS  # at least, in one measurement


@dataclass(frozen=True)
class Gateway:
    """One that runs and has loaded the model; `tokens` is the container of the photo's tokens."""

    server: Server
    address: str
    model: Tokenizer
    tokens: bytes

    def rate(self, way: Way, seconds: float) -> tuple[Load, float]:
        """What 8 clients get in a closed loop, and the processor seconds of all processes for one answer.

        Raises:
            ValueError, MalformedTokensError, UnidentifiedImageError: an answer is not what it must be.
            ServerError, ClientError: there is none.
        """
        sent = request(way, self.tokens)
        check(self.model, way, self.tokens, self._ask(way, sent))
        self.server.settle()
        before = self.server.usage().cpu
        found, answers = load(self.address + self.model.path(way), sent, CLIENTS, seconds, ANSWERS)
        return found, (self.server.usage().cpu - before) / answers

    def peaks(self, way: Way) -> Memory:
        """Of all processes together, by the number of images in one request; to be asked of a fresh gateway."""
        loaded = sum(psutil.Process(pid).memory_info().rss for pid in self.server.pids())
        above = {}
        for size in BATCHES:
            for pid in self.server.pids():
                reset_peak(pid)
            for _ in range(PEAK_STEPS):
                self._ask(way, batch(way, self.tokens, size))
            above[size] = max(0, sum(map(peak, self.server.pids())) - loaded)
        return Memory(loaded, above)

    def _ask(self, way: Way, sent: Body) -> bytes:
        return self.server.wait(self.address + self.model.path(way), sent)


@contextmanager
def serve(model: Tokenizer, tokens: bytes, workers: int) -> Iterator[Gateway]:
    """A gateway, inside the block."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    settings = {"VITRINE_REPOSITORY": str(model.repository.resolve()), "VITRINE_DEFAULT_TOKENIZER": model.name}
    with vitrine(port, workers, cache() / "logs" / f"{model.name}.log", settings) as server:
        server.wait(f"{address}/readyz")
        yield Gateway(server, address, model, tokens)
