"""Liveness, readiness and metrics."""

import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.factories import make_png


def wait_until_ready(client: TestClient) -> None:
    until = time.monotonic() + 10
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_alive(client: TestClient) -> None:
    assert client.get("/livez").json()["status"] == "ok"


def test_ready_once_a_real_inference_has_gone_through(client: TestClient) -> None:
    wait_until_ready(client)
    assert client.get("/v1/models").json()["data"][0]["status"] == "ready"


def test_not_ready_without_preloading_until_someone_asks(make_client) -> None:
    client = make_client(preload=False)
    response = client.get("/readyz")
    assert (response.status_code, response.json()["reasons"]) == (503, ["colours is not loaded yet"])
    client.post("/v1/classify", content=make_png())
    assert client.get("/readyz").status_code == 200


def test_not_ready_with_a_broken_model(make_client, repository: Path) -> None:
    (repository / "colours" / "1" / "manifest.json").unlink()
    client = make_client()
    response = client.get("/readyz")
    assert response.status_code == 503
    assert client.get("/livez").status_code == 200


def test_metrics_after_a_request(client: TestClient) -> None:
    client.post("/v1/classify", content=make_png())
    client.post("/v1/classify", content=b"nonsense")
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    counts = {
        tuple(sorted(sample.labels.items())): sample.value
        for sample in families["vitrine_request_seconds"].samples
        if sample.name.endswith("_count")
    }
    assert counts[("code", "200"), ("model", "colours"), ("task", "classify")] >= 1
    assert counts[("code", "415"), ("model", "colours"), ("task", "classify")] >= 1
    stages = {sample.labels["stage"] for sample in families["vitrine_stage_seconds"].samples}
    assert stages >= {"read", "parse", "decode", "resize", "queue", "infer", "finish", "encode"}
    assert families["vitrine_backend_up"].samples[0].value == 1
