"""The gateway under test, asked over HTTP for a stream of tokens."""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from load_tests.cache import cache
from load_tests.chat.answers import Answer, Question
from load_tests.processes import ServerError
from load_tests.servers import free_port, vitrine

PATH = "/v1/chat/completions"
_EVENT = b"data: "
_DONE = b"[DONE]"


@dataclass(frozen=True)
class Gateway:
    """One that listens on `port` of this machine."""

    port: int

    def ask(self, model: str, question: Question, tokens: int) -> Answer:
        """Greedy, one client, a connection of its own.

        Raises:
            ServerError: no stream, or one that ends with an error.
        """
        body = _body(model, question, tokens)
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        began = time.perf_counter()
        try:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(f"{response.status} {response.read(500)!r}")
            return _read(response, began)
        finally:
            connection.close()


@contextmanager
def serve(repository: Path) -> Iterator[Gateway]:
    """A gateway with all models of `repository`, as it comes, inside the block."""
    port = free_port()
    with vitrine(port, 1, cache() / "logs" / "chat.log", {"VITRINE_REPOSITORY": str(repository)}) as server:
        server.wait(f"http://127.0.0.1:{port}/readyz")
        yield Gateway(port)


def _body(model: str, question: Question, tokens: int) -> bytes:
    parts: list[dict[str, object]] = [{"type": "text", "text": question.text}]
    if question.photo is not None:
        url = f"data:image/jpeg;base64,{base64.b64encode(question.photo).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    asked = {"model": model, "messages": [{"role": "user", "content": parts}], "max_completion_tokens": tokens}
    return json.dumps(asked | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}).encode()


def _read(lines: Iterator[bytes], began: float) -> Answer:
    """The first event comes with the first token, and the last with a `finish_reason` with the last."""
    first = last = 0.0
    tokens = 0
    pieces = []
    for line in lines:
        if not line.startswith(_EVENT) or line.startswith(_EVENT + _DONE):
            continue
        now = time.perf_counter() - began
        document = json.loads(line.removeprefix(_EVENT))
        if "error" in document:
            raise ServerError(str(document["error"]))
        first = first or now
        for choice in document["choices"]:
            pieces.append(choice["delta"].get("content", ""))
            last = now if choice["finish_reason"] else last
        tokens = (document["usage"] or {}).get("completion_tokens", tokens)
    return Answer(first, last, tokens, "".join(pieces))
