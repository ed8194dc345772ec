"""Errors on routes that speak OpenAI's protocol: `{"error": {...}}` as its clients read it, with the statuses of `errors.py`."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import errors
from app.api.errors import headers_of, log_failure, status_of

log = logging.getLogger("vitrine.api")


class ErrorResponse(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorsResponse(BaseModel):
    error: ErrorResponse


UNFORESEEN = "Something went wrong in the server; its log says more under this request id."


def openai_error(error: errors.VitrineError) -> dict[str, Any]:
    """The whole body: `message` and `code` are those of `error`, `param` names the field at fault or is null.

    `type` is one of OpenAI's: `invalid_request_error`, `rate_limit_error` where the server is full, `server_error`.
    """
    return _body(error.detail, _type(status_of(error)), error.field, error.code)


def openai_error_response(error: errors.VitrineError, request_id: str) -> Response:
    """`error` as an answer; what is not the client's doing goes to the log under `request_id`."""
    log_failure(error, request_id)
    return _response(openai_error(error), status_of(error), headers_of(error))


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's shape, those that nobody foresaw too: `APIRouter(route_class=OpenAIRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except errors.VitrineError as error:
                return openai_error_response(error, request.state.request_id)
            except (HTTPException, RequestValidationError):
                raise
            except Exception:
                log.exception("request %s failed", request.state.request_id)
                return _response(_body(UNFORESEEN, _type(500), None, errors.VitrineError.code), 500)

        return handler


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": _whole(message), "type": kind, "param": param and _whole(param), "code": code}}


def _whole(text: str) -> str:
    """`text` in which half of a surrogate pair, which JSON can send and UTF-8 cannot hold, is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _response(body: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")
