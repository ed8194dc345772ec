"""`/v1/models`, in OpenAI's list shape with what a vision server adds."""

import shutil
from pathlib import Path

from starlette.testclient import TestClient

from tests.factories import make_jpeg
from tests.repository import add_entry
from tests.tokenizer_repository import add_tokenizer


def test_list(client: TestClient) -> None:
    client.post("/v1/classify", content=b"GIF89a")  # loads the model
    document = client.get("/v1/models").json()
    assert document["object"] == "list"
    (row,) = document["data"]
    assert row == {
        "id": "colours",
        "object": "model",
        "created": 1767225600,
        "owned_by": "vitrine",
        "task": "classify",
        "version": 1,
        "versions": [1],
        "engine": "onnx",
        "precision": "fp32",
        "phrases": None,
        "default": True,
        "status": "ready",
        "problems": [],
    }


def test_a_published_model_appears_without_a_restart(client: TestClient, repository: Path) -> None:
    add_entry(repository, "hues")
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["colours", "hues"]


def test_a_fault_is_listed_with_its_reason(client: TestClient, repository: Path) -> None:
    version = add_entry(repository, "broken").path
    (version / "manifest.json").write_text("{")
    assert client.post("/v1/classify?model=colours", content=make_jpeg(32, 32)).status_code == 200
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert (rows["broken"]["status"], rows["broken"]["task"], rows["colours"]["status"]) == ("failed", None, "ready")
    assert "not valid JSON" in rows["broken"]["problems"][0]
    answer = client.post("/v1/classify?model=broken", content=b"GIF89a")
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
    assert "not valid JSON" in answer.json()["detail"]


def test_detail_carries_the_manifest(client: TestClient) -> None:
    document = client.get("/v1/models/colours").json()
    assert document["manifest"]["source"]["architecture"] == "mean-colour"
    assert document["manifest"]["engine"]["sha256"]


def test_detail_of_a_version(client: TestClient, repository: Path) -> None:
    add_entry(repository, "colours", 2, description="the second")
    described = {name: client.get(f"/v1/models/{name}").json()["manifest"]["description"] for name in ("colours", "colours@1")}
    assert described["colours"] == "the second" != described["colours@1"]
    for name in ("colours@3", "colours@", "colours@x", "colours@1@2"):
        response = client.get(f"/v1/models/{name}")
        assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


def test_unknown_model(client: TestClient) -> None:
    for name in ("nothing", "..%2Fcolours", "%00"):
        response = client.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


def test_a_tokenizer_is_listed_once_with_its_task(client: TestClient, repository: Path) -> None:
    add_tokenizer(repository)
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert rows.keys() == {"colours", "greys"}
    assert (rows["greys"]["task"], rows["greys"]["status"], rows["greys"]["problems"]) == ("tokenize", "available", [])
    assert (rows["greys"]["version"], rows["greys"]["default"]) == (1, False)
    manifest = client.get("/v1/models/greys").json()["manifest"]
    assert (manifest["role"], manifest["codebook"]["size"], manifest["codebook"]["grid"]) == ("tokenize", 16, [4, 4])


def test_a_tokenizer_does_not_classify(client: TestClient, repository: Path) -> None:
    add_tokenizer(repository)
    assert len(client.get("/v1/models").json()["data"]) == 2
    answer = client.post("/v1/classify?model=greys", content=b"GIF89a")
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert "not a model for classify" in answer.json()["detail"]


def test_half_a_tokenizer_cannot_serve(client: TestClient, repository: Path) -> None:
    entries = add_tokenizer(repository)
    shutil.rmtree(entries["detokenize"].path.parent)
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert rows["greys"]["status"] == "failed"
    assert rows["greys"]["task"] == "tokenize"
    assert "the engines for detokenize are missing" in rows["greys"]["problems"][0]


def test_engines_of_two_builds_cannot_serve_together(client: TestClient, repository: Path) -> None:
    add_tokenizer(repository, build="20260101-000000")
    shutil.rmtree(repository / "greys.detokenize")
    other = add_tokenizer(repository.parent / "other", build="20260102-000000")["detokenize"]
    other.path.parent.rename(repository / "greys.detokenize")
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert "different builds" in rows["greys"]["problems"][0]
