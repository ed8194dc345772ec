"""The one table from errors to HTTP statuses, and their shape on native routes (RFC 9457 problem+json)."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import errors

log = logging.getLogger("vitrine.api")

STATUS: Mapping[type[errors.VitrineError], int] = {
    errors.MalformedRequestError: 400,
    errors.ModelNotChosenError: 400,
    errors.UnauthenticatedError: 401,
    errors.ForbiddenError: 403,
    errors.ModelNotFoundError: 404,
    errors.NotAcceptableError: 406,
    errors.SlowUploadError: 408,
    errors.TooLargeError: 413,
    errors.UnsupportedMediaError: 415,
    errors.UndecodableImageError: 422,
    errors.MalformedTokensError: 422,
    errors.InvalidValueError: 422,
    errors.CapacityError: 429,
    errors.RateLimitedError: 429,
    errors.InferenceError: 500,
    errors.UpstreamError: 502,
    errors.ShuttingDownError: 503,
    errors.ModelUnavailableError: 503,
    errors.BackendUnavailableError: 503,
    errors.DeadlineError: 504,
}

REQUEST_ID_HEADER = "X-Request-ID"
LAST_WORDS = (errors.SlowUploadError, errors.ShuttingDownError)
"""After these the connection closes: its client is slow, or the next request on it would be refused as well."""
CHALLENGE = 'Bearer realm="vitrine"'


def status_of(error: errors.VitrineError) -> int:
    return STATUS.get(type(error), 500)


def problem(error: errors.VitrineError) -> dict[str, Any]:
    """The members of RFC 9457, with our stable `code` and, where one is at fault, the `field`."""
    body = {
        "type": f"urn:vitrine:problem:{error.code}",
        "title": error.title,
        "status": status_of(error),
        "detail": error.detail,
        "code": error.code,
    }
    return body if error.field is None else body | {"field": error.field}


def problem_response(body: Mapping[str, Any], request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    content = json.dumps({**body, "request_id": request_id}, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(content, status_code=body["status"], media_type="application/problem+json", headers=headers)


def error_response(error: errors.VitrineError, request_id: str) -> Response:
    log_failure(error, request_id)
    return problem_response(problem(error), request_id, headers_of(error))


def headers_of(error: errors.VitrineError) -> dict[str, str]:
    """When to come again (RFC 9110, 10.2.3), which key to come with (RFC 6750, 3), and whether on this connection."""
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    if isinstance(error, LAST_WORDS):
        headers["Connection"] = "close"
    if isinstance(error, errors.UnauthenticatedError):
        headers["WWW-Authenticate"] = CHALLENGE + (', error="invalid_token"' if error.presented else "")
    if isinstance(error, errors.ForbiddenError):
        headers["WWW-Authenticate"] = CHALLENGE + ', error="insufficient_scope"'
    return headers


def log_failure(error: errors.VitrineError, request_id: str) -> None:
    """What is not the client's doing goes to the log, under the id that the client was told."""
    if status_of(error) >= 500 and not isinstance(error, errors.ShuttingDownError):
        log.error("request %s: %s: %s", request_id, error.code, error.detail)


def install(app: FastAPI) -> None:
    """Answer every error in one shape; what nobody foresaw is logged here and told to the client without details."""

    @app.exception_handler(errors.VitrineError)
    async def foreseen(request: Request, error: errors.VitrineError) -> Response:
        return error_response(error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return error_response(errors.InvalidValueError(f"{name}: {first['msg']}.", field=name), request.state.request_id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        detail = f"There is no {request.url.path} here; see /docs." if error.status_code == 404 else f"{error.detail}."
        body = {"type": "about:blank", "title": error.detail, "status": error.status_code, "detail": detail, "code": code}
        return problem_response(body, request.state.request_id, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        log.error("request %s failed", request.state.request_id, exc_info=error)
        body = {
            "type": "urn:vitrine:problem:internal",
            "title": errors.VitrineError.title,
            "status": 500,
            "detail": "Something went wrong in the server; its log says more under this request id.",
            "code": errors.VitrineError.code,
        }
        # Answered outside the middleware that adds this header to every other response.
        return problem_response(body, request.state.request_id, {REQUEST_ID_HEADER: request.state.request_id})
