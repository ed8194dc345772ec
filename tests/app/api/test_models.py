"""`/v1/models`, in OpenAI's list shape with what a vision server adds."""

from pathlib import Path

from starlette.testclient import TestClient

from tests.repository import add_entry


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


def test_unknown_model(client: TestClient) -> None:
    for name in ("nothing", "..%2Fcolours", "%00"):
        response = client.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
