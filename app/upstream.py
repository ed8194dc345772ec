"""The chat server behind this one: any that speaks OpenAI's `POST /v1/chat/completions`.

Its errors become those of `app/errors.py` here, in one place; neither its address nor its key is ever part of one.
"""

import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from app.errors import (
    BackendUnavailableError,
    CapacityError,
    DeadlineError,
    MalformedRequestError,
    ModelNotFoundError,
    TooLargeError,
    UpstreamError,
    VitrineError,
)

log = logging.getLogger("vitrine.upstream")

CONNECT_SECONDS = 5.0
MOST_BYTES = 16 * 1024 * 1024  # of an answer, or of one event
MOST_OF_AN_ERROR = 64 * 1024
LONGEST_MESSAGE = 500
ADDRESS = re.compile(r"\w+://\S+|(?<![\w.])/[\w.-]+(?:/[\w.-]+)+")  # URLs, and paths of its file system
END_OF_EVENT = re.compile(rb"\r?\n\r?\n")

REFUSALS: Mapping[int, tuple[type[VitrineError], str]] = {
    400: (MalformedRequestError, "The model server refuses the request."),
    404: (ModelNotFoundError, "The model server does not know this model."),
    413: (TooLargeError, "The request is too large for the model server."),
    422: (MalformedRequestError, "The model server refuses the request."),
}
"""Statuses that are about the request: what the server says of it is passed on, and this where it says nothing."""
NO_ENTRY = "The model server does not let this server in; whoever runs it must look at its key."
FAILURES: Mapping[int, tuple[type[VitrineError], str]] = {
    401: (UpstreamError, NO_ENTRY),
    403: (UpstreamError, NO_ENTRY),
    408: (DeadlineError, "The model server ran out of time."),
    503: (BackendUnavailableError, "The model server is not ready; try again later."),
    504: (DeadlineError, "The model server ran out of time."),
}
"""Statuses that are none of the client's doing; every other one is the server's failure."""


@dataclass(frozen=True)
class Event:
    """One server-sent event: `content` with the empty line that ends it, and the JSON object in it, None where it is none."""

    content: bytes
    document: dict[str, Any] | None

    @property
    def done(self) -> bool:
        return _data(self.content) == b"[DONE]"


class Upstream:
    """Asks one server. A call that is cancelled closes its connection at once, so that the server hears of it."""

    def __init__(self, address: str, key: str | None, *, silence: float) -> None:
        """`address` with or without `/v1`. `silence`: seconds that the server may let pass without a byte."""
        self._url = f"{address.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self._key = key
        self._timeout = httpx2.Timeout(silence, connect=CONNECT_SECONDS)
        self._client: httpx2.AsyncClient | None = None

    async def start(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
        self._client = httpx2.AsyncClient(timeout=self._timeout, limits=limits, trust_env=False, follow_redirects=False)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def complete(self, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """The whole answer to `body`, a JSON document; `headers` are sent beside this server's own.

        Raises:
            VitrineError: see `events`.
        """
        async with self._asked(body, {**headers, "Accept": "application/json"}) as response:
            answer = _read_object(await _read(response, MOST_BYTES))
        if answer is None or not isinstance(answer.get("choices"), list):
            raise UpstreamError("The model server gave no chat completion.")
        return answer

    async def events(self, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[Event]:
        """The events of a streamed answer, each as soon as its last byte is there, up to `[DONE]`.

        Raises:
            InputError, ModelNotFoundError, CapacityError: the server refused the request.
            BackendUnavailableError: it cannot be reached or is not ready.
            DeadlineError: it was silent for too long.
            UpstreamError: everything else that it may do wrong, also in the middle of the stream.
        """
        async with self._asked(body, {**headers, "Accept": "text/event-stream"}) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise UpstreamError("The model server gave no stream of events.")
            rest = b""
            async for chunk in response.aiter_bytes():
                *contents, rest = _split(rest + chunk)
                for content in contents:
                    event = Event(content, _read_object(_data(content)))
                    if event.document is not None and "error" in event.document:
                        raise _failure(event.document)
                    yield event
                    if event.done:
                        return
                if len(rest) > MOST_BYTES:
                    raise UpstreamError("The model server sent an event that is too long.")

    @asynccontextmanager
    async def _asked(self, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[httpx2.Response]:
        """An answer that has begun well; its connection is closed behind the block unless the answer was read to its end."""
        assert self._client is not None, "start comes first"
        own = {"Content-Type": "application/json", **({} if self._key is None else {"Authorization": f"Bearer {self._key}"})}
        with _translated():
            async with self._client.stream("POST", self._url, content=body, headers={**headers, **own}) as response:
                if response.status_code != 200:
                    raise _refusal(response, await _read(response, MOST_OF_AN_ERROR))
                yield response


async def _read(response: httpx2.Response, limit: int) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > limit:
            raise UpstreamError("The answer of the model server is too long.")
    return bytes(content)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
        log.warning("the model server cannot be reached: %s", type(error).__name__)
        raise BackendUnavailableError("The model server cannot be reached; try again later.") from error
    except httpx2.TimeoutException as error:
        raise DeadlineError("The model server said nothing for too long.") from error
    except httpx2.HTTPError as error:
        raise UpstreamError("The model server broke off its answer.") from error


def _refusal(response: httpx2.Response, content: bytes) -> VitrineError:
    """What a status that is not 200 means for the client of this server."""
    status = response.status_code
    log.warning("the model server answered %d: %s", status, content[:LONGEST_MESSAGE].decode("utf-8", "replace"))
    if status == 429:
        return CapacityError("The model server is full; retry later.", retry_after=_seconds(response), reason="upstream")
    if status in REFUSALS:
        refusal, sentence = REFUSALS[status]
        told, param = _told(_read_object(content))
        return refusal(told or sentence, field="model" if refusal is ModelNotFoundError else param)
    failure, sentence = FAILURES.get(status, (UpstreamError, "The model server failed."))
    return failure(sentence)


def _failure(document: Mapping[str, Any]) -> UpstreamError:
    """An error in the middle of a stream, whose words may be about anything: they go to the log."""
    log.warning("the model server failed in the middle of a stream: %s", json.dumps(document)[:LONGEST_MESSAGE])
    return UpstreamError("The model server failed in the middle of its answer.")


def _told(document: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """The sentence and the parameter of an error, in OpenAI's shape or FastAPI's; without addresses."""
    error: Any = None if document is None else document.get("error", document)
    if not isinstance(error, dict):
        return None, None
    message, param = error.get("message", error.get("detail")), error.get("param")
    sentence = ADDRESS.sub("...", message)[:LONGEST_MESSAGE] if isinstance(message, str) and message else None
    return sentence, param if isinstance(param, str) else None


def _seconds(response: httpx2.Response) -> float:
    """`Retry-After` where it says seconds, 1 to 60."""
    said = response.headers.get("retry-after", "")
    return float(min(60, max(1, int(said)))) if said.isdecimal() else 1.0


def _split(content: bytes) -> list[bytes]:
    """Whole events with the empty line behind each, and what is left."""
    pieces, begin = [], 0
    for end in END_OF_EVENT.finditer(content):
        pieces.append(content[begin : end.end()])
        begin = end.end()
    return [*pieces, content[begin:]]


def _data(content: bytes) -> bytes:
    """The data of an event, its lines joined."""
    lines = [line for line in content.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b"data:").removeprefix(b" ") for line in lines)


def _read_object(content: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
