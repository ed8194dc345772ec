"""Load and unload, for whoever has an admin's key."""

import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.keys import make_key
from tests.factories import make_png
from tests.repository import add_entry

SECRET, OPS = make_key("ops", "admin")
OTHER, PHOTOS = make_key("photos")
ADMIN = {"X-API-Key": SECRET}


@pytest.fixture
def client(make_client) -> TestClient:
    """A gateway with an admin's key, which is sent with every request, whose unloaded models linger for half a second."""
    client: TestClient = make_client(request_timeout=0.5, api_keys=(OPS, PHOTOS))
    client.headers.update(ADMIN)
    return client


def loaded(client: TestClient) -> bool:
    return (
        'vitrine_model_info{engine="onnxruntime",model="colours",precision="fp32",version="1"} 1.0' in client.get("/metrics").text
    )


def test_a_model_goes_and_comes_back(client: TestClient) -> None:
    assert client.post("/v1/classify", content=make_png()).status_code == 200
    gone = client.post("/v1/models/colours/unload")
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
    back = client.post("/v1/models/colours/load")
    assert (back.status_code, back.json()["status"]) == (200, "ready")
    assert loaded(client)
    assert client.post("/v1/classify", content=make_png()).status_code == 200


def test_what_is_loaded_again_in_time_is_never_unloaded(client: TestClient) -> None:
    client.post("/v1/classify", content=make_png())
    client.post("/v1/models/colours/unload")
    client.post("/v1/models/colours/load")
    time.sleep(0.7)
    assert loaded(client)


def test_a_model_that_cannot_serve_says_why(client: TestClient, repository: Path) -> None:
    add_entry(repository, "broken").engine_file.write_bytes(b"no engine")
    answer = client.post("/v1/models/broken/load")
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
    assert "version 1: " in answer.json()["detail"]


@pytest.mark.parametrize("what", ["load", "unload"])
def test_nobody_else_may(client: TestClient, make_client, what: str) -> None:
    assert client.post(f"/v1/models/nothing/{what}").status_code == 404
    refused = client.post(f"/v1/models/colours/{what}", headers={"X-API-Key": OTHER})
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    off = make_client().post(f"/v1/models/colours/{what}", headers=ADMIN)
    assert (off.status_code, off.json()["code"]) == (403, "forbidden"), "without keys there is no admin"
    assert "need an admin key" in off.json()["detail"]
