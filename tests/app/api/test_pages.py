"""The documentation, without internet, and what is not there."""

import re

from starlette.testclient import TestClient


def test_docs_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(address.endswith(".js") for address in addresses)
    for address in addresses:
        assert address.startswith("/"), address
        assert client.get(address).status_code == 200, address
    assert "://" not in page


def test_openapi_types_the_task(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/classify"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"model", "top_k"}
    assert set(operation["requestBody"]["content"]) == {"image/*", "multipart/form-data", "application/json"}
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/ClassifyResponse")
    assert operation["responses"]["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/ProblemResponse")


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    for response, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/classify"), 405)):
        assert (response.status_code, response.json()["status"]) == (status, status)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["request_id"] == response.headers["X-Request-ID"]
