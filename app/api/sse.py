"""Server-sent events: how a piece of an answer is written, and a response that lets go of what it holds when it is over."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not hold events back


def encode_event(document: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events as they come. A client that hangs up ends `events` where they wait, at once.

    Whatever is to last as long as the stream goes to `held`, which is closed in any case.
    """

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self.held = ExitStack()
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._events.aclose()
