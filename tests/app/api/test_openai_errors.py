"""Errors in OpenAI's shape: the same statuses as everywhere, a type that its clients know, the field at fault as `param`."""

import json
from collections.abc import Iterator

import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from app import errors
from app.api.errors import STATUS, status_of
from app.api.middleware import RequestIds
from app.api.openai_errors import OpenAIRoute, openai_error, openai_error_response


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.__name__)
def test_every_error_has_the_members_of_openai(kind: type[errors.VitrineError]) -> None:
    error = errors.RateLimitedError("What to do.", retry_after=1) if kind is errors.RateLimitedError else kind("What to do.")
    error.field = "model"
    status = status_of(error)
    wanted = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    assert openai_error(error) == {"error": {"message": "What to do.", "type": wanted, "param": "model", "code": kind.code}}


def test_a_full_server_says_when_to_come_again() -> None:
    response = openai_error_response(errors.CapacityError("Full.", retry_after=1.2), "id")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "2")
    assert json.loads(response.body)["error"]["param"] is None


def test_the_last_words_of_a_connection_end_it() -> None:
    response = openai_error_response(errors.ShuttingDownError("Ends."), "id")
    assert (response.status_code, response.headers["Retry-After"], response.headers["Connection"]) == (503, "1", "close")


@pytest.fixture
def client() -> Iterator[TestClient]:
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/foreseen")
    async def foreseen() -> None:
        raise errors.ModelNotFoundError("There is no such model.", field="model")

    @router.get("/unforeseen")
    async def unforeseen() -> None:
        raise RuntimeError("a secret")

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(RequestIds)
    with TestClient(app) as client:
        yield client


def test_what_a_route_raises_has_that_shape(client: TestClient) -> None:
    response = client.get("/foreseen")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_what_nobody_foresaw_is_told_without_details(client: TestClient) -> None:
    response = client.get("/unforeseen")
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal")
    assert "secret" not in response.text
    assert response.headers["X-Request-ID"]
