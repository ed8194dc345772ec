"""What lies around every route: the id of the request, and the short way to the routes that must be fast."""

import random
import re
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import REQUEST_ID_HEADER
from app.logs import REQUEST_ID

HEADER = REQUEST_ID_HEADER.lower().encode()
SENSIBLE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Sets `request.state.request_id`, the client's own when it is a sensible one, and says it in every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        request_id = given if SENSIBLE.fullmatch(given) else _new_id()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        REQUEST_ID.set(request_id.decode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        await self.app(scope, receive, send_with_id)


def _new_id() -> bytes:
    """32 hexadecimal digits; the operating system is not asked, since that lets go of the interpreter's lock."""
    return b"%032x" % random.getrandbits(128)


class DirectPosts:
    """Answers POST on some paths without the router and what FastAPI puts around an endpoint, a fifth of a small request's time.

    The same endpoints are routes of the application too: for its description, for other methods, and below a `root_path`.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Callable[[Request], Awaitable[Response]]]) -> None:
        self.app = app
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self.endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
