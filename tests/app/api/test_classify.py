"""`POST /v1/classify` as a client sees it, on the embedded engine."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from app import errors
from app.api.errors import STATUS
from app.api.schemas import ClassifyResponse
from tests.factories import encode, make_jpeg, make_png
from tests.repository import add_entry

RED = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
BLUE = encode(Image.new("RGB", (30, 40), (10, 10, 200)), "JPEG")
FORM = "application/x-www-form-urlencoded"


def labels(answer: dict) -> list[str]:
    return [result["predictions"][0]["label"] for result in answer["results"]]


def test_raw_body(client: TestClient) -> None:
    response = client.post("/v1/classify", content=RED, headers={"Content-Type": "image/png"})
    assert response.status_code == 200
    answer = response.json()
    ClassifyResponse.model_validate(answer)
    assert labels(answer) == ["red"]
    assert (answer["model"], answer["version"], answer["task"], answer["warnings"]) == ("colours", 1, "classify", [])
    assert answer["id"] == response.headers["X-Request-ID"]
    image = answer["results"][0]["image"]
    assert (image["format"], image["width"], image["height"], image["orientation"]) == ("PNG", 40, 30, 1)
    scores = [prediction["score"] for prediction in answer["results"][0]["predictions"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


def test_server_timing_names_every_stage(client: TestClient) -> None:
    timing = client.post("/v1/classify", content=RED).headers["Server-Timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")] == [
        "read", "parse", "decode", "resize", "queue", "infer", "finish", "encode",
    ]  # fmt: skip


@pytest.mark.parametrize("declared", [FORM, "application/octet-stream", ""])
def test_bytes_decide_what_the_body_is(client: TestClient, declared: str) -> None:
    answer = client.post("/v1/classify", content=BLUE, headers={"Content-Type": declared}).json()
    assert labels(answer) == ["blue"]
    assert answer["warnings"] == []


@pytest.mark.parametrize("declared", ["image/png", "text/plain"])
def test_wrong_content_type_is_reported_not_believed(client: TestClient, declared: str) -> None:
    answer = client.post("/v1/classify", content=BLUE, headers={"Content-Type": declared}).json()
    assert labels(answer) == ["blue"]
    assert declared in answer["warnings"][0]
    assert "image/jpeg" in answer["warnings"][0]


def test_image_under_a_json_content_type(client: TestClient) -> None:
    answer = client.post("/v1/classify", content=RED, headers={"Content-Type": "application/json"}).json()
    assert labels(answer) == ["red"]
    assert "application/json" in answer["warnings"][0]


def test_multipart_batch_keeps_the_order(client: TestClient) -> None:
    files = [("image", ("a.png", RED)), ("image", ("b.jpg", BLUE)), ("image", ("c.png", RED))]
    answer = client.post("/v1/classify", files=files, data={"top_k": "2"}).json()
    assert labels(answer) == ["red", "blue", "red"]
    assert [len(result["predictions"]) for result in answer["results"]] == [2, 2, 2]
    assert [result["index"] for result in answer["results"]] == [0, 1, 2]


def test_json_forms(client: TestClient) -> None:
    red, blue = (base64.b64encode(image).decode() for image in (RED, BLUE))
    one = client.post("/v1/classify", json={"image": {"base64": red}, "top_k": 1}).json()
    assert labels(one) == ["red"]
    many = client.post("/v1/classify", json={"images": [f"data:image/png;base64,{red}", {"url": f"data:;base64,{blue}"}]}).json()
    assert labels(many) == ["red", "blue"]


def test_json_without_its_content_type(client: TestClient) -> None:
    body = json.dumps({"image": {"base64": base64.b64encode(RED).decode()}})
    assert labels(client.post("/v1/classify", content=body, headers={"Content-Type": FORM}).json()) == ["red"]


def test_a_bad_image_in_a_batch_fails_alone(client: TestClient) -> None:
    files = [
        ("image", ("a.png", RED)),
        ("image", ("b.txt", b"not an image")),
        ("image", ("c.jpg", BLUE[:200])),
        ("image", ("d", BLUE)),
    ]
    response = client.post("/v1/classify", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [results[i]["predictions"][0]["label"] for i in (0, 3)] == ["red", "blue"]
    assert [results[i]["error"]["status"] for i in (1, 2)] == [415, 422]
    assert "predictions" not in results[1]


def test_when_every_image_fails_the_batch_is_422(client: TestClient) -> None:
    response = client.post("/v1/classify", files=[("image", b"a"), ("image", b"b")])
    assert response.status_code == 422
    assert [result["error"]["code"] for result in response.json()["results"]] == ["unsupported_media"] * 2


def test_versions(client: TestClient, repository: Path) -> None:
    first = client.post("/v1/classify", content=RED).json()
    add_entry(repository, version=2)
    client.get("/v1/models")
    newest = first
    while newest["version"] == 1:  # the loaded version answers until the new one is ready
        newest = client.post("/v1/classify?model=colours", content=RED).json()
    old = client.post("/v1/classify?model=colours@1", content=RED).json()
    assert [answer["version"] for answer in (first, newest, old)] == [1, 2, 1]
    score, newer, older = (answer["results"][0]["predictions"][0]["score"] for answer in (first, newest, old))
    assert newer > score == older


def test_orientation_is_undone_and_said(client: TestClient) -> None:
    image = client.post("/v1/classify", content=make_jpeg(60, 40, orientation=6)).json()["results"][0]["image"]
    assert (image["width"], image["height"], image["orientation"]) == (40, 60, 6)


@pytest.mark.parametrize(
    ("query", "status", "code", "field"),
    [
        ("model=nothing", 404, "model_not_found", "model"),
        ("model=colours@7", 404, "model_not_found", "model"),
        ("model=colours@x", 404, "model_not_found", "model"),
        ("model=../colours", 404, "model_not_found", "model"),
        ("top_k=0", 422, "invalid_value", "top_k"),
        ("top_k=7", 422, "invalid_value", "top_k"),
        ("top_k=many", 422, "invalid_value", "top_k"),
        ("topk=3", 422, "invalid_value", "topk"),
    ],
)
def test_bad_parameters(client: TestClient, query: str, status: int, code: str, field: str) -> None:
    response = client.post(f"/v1/classify?{query}", content=RED)
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, problem["status"], problem["code"], problem["field"]) == (status, status, code, field)
    assert problem["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "image/png", 400, "malformed_request"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 415, "unsupported_media"),
        (BLUE[:200], "image/jpeg", 422, "undecodable_image"),
        (b"{", "application/json", 400, "malformed_request"),
        (b"[]", "application/json", 400, "malformed_request"),
        (b"{}", "application/json", 400, "malformed_request"),
        (b'{"image": 1}', "application/json", 400, "malformed_request"),
        (b'{"image": {"base64": "%%%"}}', "application/json", 400, "malformed_request"),
        (b'{"image": "data:image/png,abc"}', "application/json", 400, "malformed_request"),
        (b'{"images": []}', "application/json", 400, "malformed_request"),
        (b'{"images": "x"}', "application/json", 400, "malformed_request"),
        (b"[" * 100_000, "application/json", 400, "malformed_request"),
        (b"--x\r\n", "multipart/form-data", 400, "malformed_request"),
        (b"no boundary here", "multipart/form-data; boundary=x", 400, "malformed_request"),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\ncut',
            "multipart/form-data; boundary=x",
            400,
            "malformed_request",
        ),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "malformed_request"),
        (b"--x--\r\n", f"multipart/form-data; boundary={'x' * 300}", 400, "malformed_request"),
        (b'{"images": [' + b"[]," * 200_000 + b"[]]}", "application/json", 413, "too_large"),
        (b'{"image": "a", "\\ud800": 1}', "application/json", 422, "invalid_value"),
        (b'{"image": "a", "b": "' + b"," * 600_000 + b'"}', "application/json", 413, "too_large"),
    ],
)
def test_bad_bodies(client: TestClient, body: bytes, content_type: str, status: int, code: str) -> None:
    response = client.post("/v1/classify", content=body, headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["code"]) == (status, code)


def test_a_file_in_another_form_field_is_named(client: TestClient) -> None:
    problem = client.post("/v1/classify", files={"photo": ("a.png", RED)}).json()
    assert (problem["status"], problem["field"]) == (400, "photo")


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    response = client.post("/v1/classify", content=RED, headers={"Content-Encoding": "gzip"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media")


def test_limits(make_client) -> None:
    client = make_client(max_body_bytes=5000, max_images=2, max_image_pixels=2000, max_image_side=400)
    assert client.post("/v1/classify", content=RED).status_code == 200
    assert client.post("/v1/classify", content=b"x" * 5001).status_code == 413
    chunks = (b"x" * 1000 for _ in range(6))
    assert client.post("/v1/classify", content=chunks).status_code == 413
    assert client.post("/v1/classify", files=[("image", RED)] * 3).json()["code"] == "too_large"
    assert client.post("/v1/classify", content=make_png(50, 50)).status_code == 413
    assert client.post("/v1/classify", content=encode(Image.new("1", (500, 1)), "PNG")).status_code == 413


def test_several_models_and_no_default(make_client, repository: Path) -> None:
    add_entry(repository, "hues")
    client = make_client(default_classify="gone")
    response = client.post("/v1/classify", content=RED)
    assert (response.status_code, response.json()["code"]) == (400, "model_not_chosen")
    assert "colours, hues" in response.json()["detail"]
    assert client.post("/v1/classify?model=hues", content=RED).json()["model"] == "hues"


def test_the_only_model_is_the_default(make_client) -> None:
    assert make_client(default_classify="gone").post("/v1/classify", content=RED).json()["model"] == "colours"


def test_an_engine_that_fails_is_a_500_without_a_trace(make_client, repository: Path) -> None:
    add_entry(repository, "fussy", poison=True)
    client = make_client()
    poison = encode(Image.new("RGB", (16, 16), (255, 0, 0)), "PNG")
    response = client.post("/v1/classify?model=fussy", content=poison)
    assert (response.status_code, response.json()["code"]) == (500, "inference_failed")
    assert "Traceback" not in response.text
    batch = client.post("/v1/classify?model=fussy", files=[("image", RED), ("image", poison), ("image", BLUE)])
    results = batch.json()["results"]
    assert (batch.status_code, results[1]["error"]["code"]) == (200, "inference_failed")
    assert [results[i]["predictions"][0]["label"] for i in (0, 2)] == ["red", "blue"]


def test_an_expired_request_is_504(make_client) -> None:
    response = make_client(request_timeout=1e-6).post("/v1/classify", content=RED)
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


def test_a_full_server_is_429_with_retry_after(make_client) -> None:
    client = make_client(max_body_bytes_in_flight=100)
    response = client.post("/v1/classify", content=RED)
    assert (response.status_code, response.json()["code"]) == (429, "full")
    assert int(response.headers["Retry-After"]) >= 1
    assert client.post("/v1/classify", content=b"x").status_code == 415


def test_request_ids(client: TestClient) -> None:
    given = client.post("/v1/classify", content=RED, headers={"X-Request-ID": "order-66"})
    assert given.headers["X-Request-ID"] == given.json()["id"] == "order-66"
    unfit = client.post("/v1/classify", content=b"", headers={"X-Request-ID": "a b" * 100})
    assert unfit.headers["X-Request-ID"] == unfit.json()["request_id"] != "a b" * 100


def test_a_failure_of_ours_is_in_the_log_under_its_request_id(
    make_client, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_entry(repository, "fussy", poison=True)
    client = make_client()
    poison = encode(Image.new("RGB", (16, 16), (255, 0, 0)), "PNG")
    client.post("/v1/classify?model=fussy", content=poison, headers={"X-Request-ID": "alone"})
    client.post("/v1/classify?model=fussy", files=[("image", RED), ("image", poison)], headers={"X-Request-ID": "in-a-batch"})
    client.post("/v1/classify?model=fussy", content=b"text", headers={"X-Request-ID": "the-clients"})
    for request_id, logged in (("alone", True), ("in-a-batch", True), ("the-clients", False)):
        assert (request_id in caplog.text) == logged


def test_what_nobody_foresaw_is_a_500_without_details(make_client, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    client.app.router.routes.insert(0, Route("/broken", lambda request: 1 / 0))
    response = client.get("/broken", headers={"X-Request-ID": "surprise"})
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "division" not in response.text
    assert response.headers["X-Request-ID"] == "surprise"
    assert "surprise" in caplog.text


def test_a_form_of_too_many_parts_is_refused(client: TestClient) -> None:
    for field, parts in (("image", 1000), ("note", 2200)):
        response = client.post("/v1/classify", files=[(field, (None, b"x"))] * parts)
        assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert client.post("/v1/classify", json={"images": [0] * 1000}).status_code == 413


def test_every_error_has_its_status() -> None:
    leaves = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.VitrineError)]
    assert {error for error in leaves if not error.__subclasses__()} == set(STATUS)


def test_errors_carry_the_time_of_the_stages_they_reached(client: TestClient) -> None:
    timing = client.post("/v1/classify", content=BLUE[:200]).headers["Server-Timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")][:3] == ["read", "parse", "decode"]
