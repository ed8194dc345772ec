"""Who may ask for what: API keys before every route but those that say nothing about models, requests and clients.

Nothing here runs unless keys are set (`VITRINE_API_KEYS`, `VITRINE_API_KEYS_FILE`); admin routes answer 403 then.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics
from app.api.errors import error_response
from app.api.openai_errors import openai_error_response
from app.errors import AccessError, ForbiddenError, RateLimitedError, UnauthenticatedError
from app.keys import ApiKey, Keyring, read_keys

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.strategies import RateLimiter

log = logging.getLogger("vitrine.keys")

LOOK_SECONDS = 1.0  # between two looks at the file of keys
METRICS = "/metrics"
OPEN = frozenset(("/livez", "/readyz", "/docs", "/openapi.json", "/status"))
OPEN_BELOW = ("/docs/assets/", "/status/assets/")


class Access:
    """The keys that are known now, and what they may do."""

    def __init__(self, keys: Sequence[ApiKey] = (), file: Path | None = None, processes: int = 1) -> None:
        """`file` may change while the gateway runs. Each of `processes` gives a key its part of the key's rate.

        Raises:
            ValueError: the file cannot be read, or has something that is no key's line.
        """
        self.required = bool(keys) or file is not None
        self._keys = tuple(keys)
        self._file = file
        self._rates = Rates(processes)
        self._seen = _stamp(file)
        self._keyring = Keyring(self._all())

    def identify(self, headers: Mapping[str, str]) -> ApiKey:
        """Whose key a request carries: `Authorization: Bearer KEY`, or else `X-API-Key: KEY`.

        Raises:
            UnauthenticatedError: there is none, or one that is not known.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not presented:
            raise UnauthenticatedError("This server wants an API key: Authorization: Bearer KEY, or X-API-Key: KEY.")
        key = self._keyring.find(presented)
        if key is None:
            raise UnauthenticatedError("The API key is not one that this server knows.", presented=True)
        return key

    def allow(self, key: ApiKey, path: str) -> None:
        """Whether `key` may ask for `path` now.

        Raises:
            ForbiddenError: it is of another kind.
            RateLimitedError: it has used up its rate.
        """
        if key.kind != "admin" and (key.kind == "monitor") != (path == METRICS):
            raise ForbiddenError(f"The API key {key.name} is one of a {key.kind}, which may not ask for {path}.")
        if key.rate and (wait := self._rates.hit(key)) is not None:
            raise RateLimitedError(f"The API key {key.name} may send {key.rate}; try again later.", retry_after=wait)

    async def admin(self, request: Request) -> ApiKey:
        """The dependency of an admin route, as in `APIRouter(dependencies=[Depends(services.access.admin)])`.

        Raises:
            ForbiddenError: no keys are set here, or the request's is not an admin's.
            UnauthenticatedError: the request has none.
        """
        if not self.required:
            raise ForbiddenError("Admin routes are off; they need an admin key: `vitrine key NAME --kind admin`.")
        key = self.identify(request.headers)
        if key.kind != "admin":
            raise ForbiddenError(f"The API key {key.name} is one of a {key.kind}; this needs an admin's.")
        return key

    async def watch(self) -> None:
        """Read the file again whenever it changes; one that cannot be read leaves the keys as they are. Never returns."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed since it was read."""
        if (stamp := _stamp(self._file)) == self._seen:
            return
        self._seen = stamp
        try:
            keys = self._all()
        except ValueError as error:
            log.warning("the API keys stay as they are: %s", error)
            return
        self._keyring = Keyring(keys)
        log.info("%d API keys are known now", len(keys))

    def _all(self) -> tuple[ApiKey, ...]:
        return self._keys if self._file is None else self._keys + read_keys(self._file)


class Rates:
    """How many requests each key has sent of late, counted in this process."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._items: dict[str, RateLimitItem] = {}

    @cached_property
    def _limiter(self) -> "RateLimiter":
        """Imported when the first key with a rate is used: others need not wait for it, or hold it."""
        from limits.storage import MemoryStorage  # noqa: PLC0415
        from limits.strategies import SlidingWindowCounterRateLimiter  # noqa: PLC0415

        return SlidingWindowCounterRateLimiter(MemoryStorage())

    def hit(self, key: ApiKey) -> float | None:
        """Count one request; or the seconds to wait, when the key has sent what it may."""
        limiter, item = self._limiter, self._items.get(key.rate) or self._parse(key.rate)
        if limiter.hit(item, key.name):
            return None
        return max(0.0, limiter.get_window_stats(item, key.name).reset_time - time.time())

    def _parse(self, rate: str) -> "RateLimitItem":
        """The part of `rate` that is this process's, at least one request."""
        from limits import parse  # noqa: PLC0415

        whole = parse(rate)
        part = type(whole)(max(1, whole.amount // self._processes), whole.multiples)
        return self._items.setdefault(rate, part)


class RequireKey:
    """Answers 401, 403 and 429 in place of a route, before the body is read; counts the other answers by the name of their key."""

    def __init__(self, app: ASGIApp, access: Access, openai_paths: Collection[str] = ()) -> None:
        """`openai_paths` are refused in OpenAI's shape."""
        self.app = app
        self.access = access
        self.openai_paths = openai_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            await self.app(scope, receive, send)
            return
        name = ""

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.count_key(name, message["status"])
            await send(message)

        try:
            key = self.access.identify(Headers(scope=scope))
            name = key.name
            self.access.allow(key, scope["path"])
        except AccessError as error:
            refuse = openai_error_response if scope["path"] in self.openai_paths else error_response
            await refuse(error, scope["state"]["request_id"])(scope, receive, send_counted)
            return
        await self.app(scope, receive, send_counted)


def is_open(path: str) -> bool:
    """Whether `path` is answered without a key: alive, ready, and the pages, which have no figures of their own."""
    return path in OPEN or path.startswith(OPEN_BELOW)


def _stamp(file: Path | None) -> tuple[int, ...]:
    """Differs when the file does, also where it is a link to another one now."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        found = None
    return () if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
