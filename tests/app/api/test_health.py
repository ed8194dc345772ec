"""Liveness, readiness and metrics."""

import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.factories import make_png
from tests.repository import add_entry


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


def test_ready_with_a_broken_model_beside_the_default(make_client, repository: Path) -> None:
    """Of which task it is, nobody knows: those that have no model name it, and are not waited for."""
    (add_entry(repository, "broken").path / "manifest.json").unlink()
    client = make_client()
    wait_until_ready(client)
    refused = client.post("/v1/tokenize", content=make_png())
    assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
    assert "Not read: broken: version 1" in refused.json()["detail"]


def counts(client: TestClient, name: str) -> dict[tuple[str, ...], float]:
    """The samples `name` of /metrics by the values of their labels, in the order of the labels' names."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples if sample.name == name)
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}


def test_metrics_after_a_request(client: TestClient) -> None:
    wait_until_ready(client)
    watched = ("vitrine_request_seconds_count", "vitrine_stage_seconds_count", "vitrine_images_total", "vitrine_image_pixels_count")
    before = [counts(client, name) for name in watched]
    client.post("/v1/classify", content=make_png())
    client.post("/v1/classify", content=b"nonsense")
    requests, stages, images, pixels = (
        {labels: value - old.get(labels, 0) for labels, value in counts(client, name).items()}
        for name, old in zip(watched, before, strict=True)
    )
    assert requests["200", "colours", "classify"] == 1
    assert requests["415", "colours", "classify"] == 1
    assert {labels: stages[labels] for labels in stages if labels[0] == "colours"} == {
        ("colours", stage, "classify"): 1.0 if stage in ("resize", "infer") else 2.0
        for stage in ("read", "parse", "decode", "resize", "queue", "infer", "finish", "encode")
    }
    assert images["colours", "classify"] == 1
    assert pixels[()] == 1
    assert counts(client, "vitrine_backend_up")["onnxruntime",] == 1
    assert counts(client, "vitrine_model_info")["onnxruntime", "colours", "fp32", "1"] == 1


def test_refused_images_are_counted_by_code_and_format(client: TestClient) -> None:
    failures, formats = (counts(client, f"vitrine_{kind}_failures_total") for kind in ("image", "decode"))
    broken = make_png()[:60]
    client.post("/v1/classify", files=[("image", broken), ("image", b"nonsense"), ("image", make_png())])
    assert counts(client, "vitrine_image_failures_total")["undecodable_image",] == failures["undecodable_image",] + 1
    assert counts(client, "vitrine_image_failures_total")["unsupported_media",] == failures["unsupported_media",] + 1
    assert counts(client, "vitrine_decode_failures_total")["PNG",] == formats["PNG",] + 1
    assert counts(client, "vitrine_decode_failures_total")["unknown",] == formats["unknown",] + 1


def test_a_model_that_nobody_has_is_no_label(client: TestClient) -> None:
    name = "made-up-by-a-client"
    assert client.post(f"/v1/classify?model={name}", content=make_png()).status_code == 404
    text = client.get("/metrics").text
    assert name not in text
    assert counts(client, "vitrine_request_seconds_count")["404", "", "classify"] >= 1


def test_a_refused_request_is_counted_by_what_is_full(make_client) -> None:
    client = make_client(max_body_bytes_in_flight=10)
    before = counts(client, "vitrine_rejected_total")["bytes",]
    assert client.post("/v1/classify", content=make_png()).status_code == 429
    assert counts(client, "vitrine_rejected_total")["bytes",] == before + 1
