"""The documentation, without internet, and what is not there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.keys import ApiKey, make_key
from tests.app.api.conftest import MakeClient

PAGES = ("/docs", "/status")
MAY = {"/docs": {"style-src": "'self' 'unsafe-inline'", "img-src": "'self' data: blob:"}, "/status": {}}


@pytest.mark.parametrize("path", PAGES)
def test_pages_hold_the_browser_to_this_server(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(directive.strip().split(" ", 1) for directive in answer.headers["content-security-policy"].split(";"))
    nothing = dict.fromkeys(("base-uri", "form-action", "frame-ancestors", "object-src"), "'none'")
    assert policy == {"default-src": "'self'", **nothing, **MAY[path]}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_nothing_inline_and_name_only_files_that_are_there(client: TestClient, path: str) -> None:
    page = client.get(path).text
    assert not re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|://", page)
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {Path(address).suffix for address in addresses} >= {".js", ".css", ".svg"}
    for address in addresses:
        assert not address.startswith("/"), "a proxy may put a prefix before it"
        answer = client.get(f"/{address}")
        assert (answer.status_code, answer.headers.get("x-content-type-options")) == (
            200,
            "nosniff" if "assets" in address else None,
        )


def references(part: Any) -> Iterator[str]:
    """Every `$ref` of a document."""
    if isinstance(part, list):
        part = dict(enumerate(part))
    for name, each in part.items() if isinstance(part, dict) else ():
        if name == "$ref":
            yield each
        yield from references(each)


@pytest.mark.parametrize("keys", [(), (make_key("reader")[1],)], ids=["open", "keys"])
def test_openapi_refers_to_what_it_has(make_client: MakeClient, keys: tuple[ApiKey, ...]) -> None:
    document = make_client(api_keys=keys).get("/openapi.json").json()
    wanted = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert wanted <= document["components"]["schemas"].keys()


def test_openapi_types_the_task(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/classify"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"model", "top_k", "labels", "template"}
    assert set(operation["requestBody"]["content"]) == {"image/*", "multipart/form-data", "application/json"}
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/ClassifyResponse")
    assert operation["responses"]["429"]["content"].keys() == {"application/problem+json"}
    assert operation["responses"]["429"]["content"]["application/problem+json"]["schema"]["$ref"].endswith("/ProblemResponse")
    assert operation["responses"]["422"]["content"].keys() == {"application/problem+json", "application/json"}


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    for response, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/classify"), 405)):
        assert (response.status_code, response.json()["status"]) == (status, status)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["request_id"] == response.headers["X-Request-ID"]


IMAGES = {"image/*", "multipart/form-data", "application/json"}
TOKENS = {"application/json", "application/x-npy", "application/vnd.vitrine.tokens"}
PICTURES = {"application/json", "image/png", "image/jpeg", "image/webp", "application/x-npy"}


@pytest.mark.parametrize(
    ("task", "parameters", "bodies", "answers"),
    [
        ("tokenize", {"model", "psnr"}, IMAGES, TOKENS),
        ("detokenize", {"model", "codebook", "quality"}, TOKENS, PICTURES),
        ("reconstruct", {"model", "quality"}, IMAGES, PICTURES),
    ],
)
def test_openapi_tells_every_form_of_tokens(
    client: TestClient, task: str, parameters: set[str], bodies: set[str], answers: set[str]
) -> None:
    operation = client.get("/openapi.json").json()["paths"][f"/v1/{task}"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == parameters
    assert set(operation["requestBody"]["content"]) == bodies
    answer = operation["responses"]["200"]["content"]
    assert set(answer) == answers
    assert answer["application/json"]["schema"]["$ref"].endswith(f"/{task.capitalize()}Response")
    assert {"X-Model", "X-Codebook", "X-PSNR"} <= set(operation["responses"]["200"]["headers"])
    assert all(answer[form]["schema"]["format"] == "binary" for form in answers - {"application/json"})
    assert operation["responses"]["406"]["content"]["application/problem+json"]["schema"]["$ref"].endswith("/ProblemResponse")


DRAWN = {"application/json", "image/png", "image/jpeg", "image/webp"}
DETECT = {"model", "phrases", "threshold", "max_detections", "classes", "masks", "render", "quality", "format", "image_id"}


@pytest.mark.parametrize(
    ("task", "parameters", "answers"),
    [
        ("detect", DETECT, {*DRAWN, "application/vnd.coco+json"}),
        ("ground", {"model", "phrase", "render", "quality"}, DRAWN),
    ],
)
def test_openapi_tells_every_form_of_boxes(client: TestClient, task: str, parameters: set[str], answers: set[str]) -> None:
    operation = client.get("/openapi.json").json()["paths"][f"/v1/{task}"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == parameters
    assert set(operation["requestBody"]["content"]) == IMAGES
    answer = operation["responses"]["200"]["content"]
    assert set(answer) == answers
    assert answer["application/json"]["schema"]["$ref"].endswith(f"/{task.capitalize()}Response")
    assert all(answer[form]["schema"]["format"] == "binary" for form in answers if form.startswith("image/"))
    assert set(operation["responses"]["200"]["headers"]) == {"X-Model"}
    if task == "detect":
        row = answer["application/vnd.coco+json"]["schema"]["items"]["properties"]
        assert set(row) == {"image_id", "category_id", "bbox", "score", "segmentation"}
