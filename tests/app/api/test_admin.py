"""Load and unload, behind a guard that stands for whatever whoever includes the routes puts there."""

import time
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from app.api.admin import admin_router
from app.errors import ModelUnavailableError
from tests.factories import make_png
from tests.repository import add_entry

ADMIN = {"X-API-Key": "secret"}


async def guard(request: Request) -> None:
    if request.headers.get("X-API-Key") != ADMIN["X-API-Key"]:
        raise ModelUnavailableError("You may not.")


@pytest.fixture
def client(make_client) -> TestClient:
    """A gateway whose unloaded models linger for half a second."""
    client: TestClient = make_client(request_timeout=0.5)
    app = client.app
    assert isinstance(app, FastAPI)
    app.include_router(admin_router(app.state.services, guard))
    return client


def loaded(client: TestClient) -> bool:
    return (
        'vitrine_model_info{engine="onnxruntime",model="colours",precision="fp32",version="1"} 1.0' in client.get("/metrics").text
    )


def test_a_model_goes_and_comes_back(client: TestClient) -> None:
    assert client.post("/v1/classify", content=make_png()).status_code == 200
    gone = client.post("/v1/models/colours/unload", headers=ADMIN)
    assert (gone.status_code, gone.json()["status"]) == (200, "unloaded")
    refused = client.post("/v1/classify", content=make_png())
    assert (refused.status_code, refused.json()["code"]) == (503, "model_unavailable")
    assert "unloaded by an administrator" in refused.json()["detail"]
    assert loaded(client), "for requests that have begun"
    end = time.monotonic() + 10
    while loaded(client):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert client.get("/readyz").status_code == 200, "it was meant"
    assert client.get("/v1/models").json()["data"][0]["status"] == "unloaded"
    back = client.post("/v1/models/colours/load", headers=ADMIN)
    assert (back.status_code, back.json()["status"]) == (200, "ready")
    assert loaded(client)
    assert client.post("/v1/classify", content=make_png()).status_code == 200


def test_what_is_loaded_again_in_time_is_never_unloaded(client: TestClient) -> None:
    client.post("/v1/classify", content=make_png())
    client.post("/v1/models/colours/unload", headers=ADMIN)
    client.post("/v1/models/colours/load", headers=ADMIN)
    time.sleep(0.7)
    assert loaded(client)


def test_a_model_that_cannot_serve_says_why(client: TestClient, repository: Path) -> None:
    add_entry(repository, "broken").engine_file.write_bytes(b"no engine")
    answer = client.post("/v1/models/broken/load", headers=ADMIN)
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
    assert "version 1: " in answer.json()["detail"]


@pytest.mark.parametrize("what", ["load", "unload"])
def test_nobody_else_may(client: TestClient, make_client, what: str) -> None:
    assert client.post(f"/v1/models/colours/{what}").status_code == 503
    assert client.post(f"/v1/models/nothing/{what}", headers=ADMIN).status_code == 404
    assert make_client().post(f"/v1/models/colours/{what}", headers=ADMIN).status_code == 404, "there is no such route by itself"
