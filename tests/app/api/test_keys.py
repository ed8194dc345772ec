"""Who may ask for what, over HTTP: without keys, with keys of every kind, with rates, with a file that changes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from app import errors
from app.api import errors as api_errors
from app.api.keys import Access, is_open
from app.api.middleware import RequestIds
from app.keys import ApiKey, make_key
from app.main import create_app
from app.settings import Settings
from tests.app.api.conftest import MakeClient
from tests.factories import make_png
from tests.repository import make_repository

CLIENT, PHOTOS = make_key("photos")
MONITOR, SCRAPE = make_key("scrape", "monitor")
ADMIN, OPS = make_key("ops", "admin")
STRANGER, _ = make_key("photos")
KEYS = ",".join(map(str, (PHOTOS, SCRAPE, OPS)))
PAGES = ("/livez", "/readyz", "/docs", "/openapi.json", "/status", "/docs/assets/swagger-ui.css", "/status/assets/status.js")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    repository = make_repository(tmp_path_factory.mktemp("guarded") / "repository")
    settings = Settings(_env_file=None, repository=repository, default_classify="colours", repository_poll=0, api_keys=KEYS)
    with TestClient(create_app(settings)) as client:
        yield client


def test_without_keys_everyone_may_ask(client: TestClient) -> None:
    assert client.post("/v1/classify", content=make_png()).status_code == 200
    assert client.post("/v1/classify", content=make_png(), headers=bearer("whatever")).status_code == 200
    assert client.get("/metrics").status_code == 200
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


@pytest.mark.parametrize("headers", [bearer(CLIENT), {"Authorization": f"bearer  {CLIENT}"}, {"X-API-Key": CLIENT}, bearer(ADMIN)])
def test_a_key_in_either_header(guarded: TestClient, headers: dict[str, str]) -> None:
    answer = guarded.post("/v1/classify", content=make_png(), headers=headers)
    assert (answer.status_code, answer.json()["model"]) == (200, "colours")
    assert guarded.get("/v1/models", headers=headers).status_code == 200


def test_a_proxy_may_keep_authorization_for_itself(guarded: TestClient) -> None:
    headers = {"Authorization": "Basic cHJveHk6d29yZA==", "X-API-Key": CLIENT}
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({}, ""),
        ({"Authorization": "Bearer"}, ""),
        ({"Authorization": CLIENT}, ""),
        ({"Authorization": f"Basic {CLIENT}"}, ""),
        ({"Cookie": f"X-API-Key={CLIENT}"}, ""),
        (bearer(STRANGER), "invalid_token"),
        (bearer(CLIENT[:-1]), "invalid_token"),
        (bearer(PHOTOS.digest.hex()), "invalid_token"),
        (bearer("é" * 40), "invalid_token"),
        ({"X-API-Key": STRANGER}, "invalid_token"),
        (bearer(STRANGER) | {"X-API-Key": CLIENT}, "invalid_token"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/classify"), ("GET", "/metrics"), ("GET", "/v1/nothing")])
def test_without_a_key_that_is_known(guarded: TestClient, headers: dict[str, str], error: str, method: str, path: str) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = guarded.request(method, path, content=make_png(), headers=encoded)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == 'Bearer realm="vitrine"' + (f', error="{error}"' if error else "")
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
@pytest.mark.parametrize(("key", "status", "code"), [(STRANGER, 401, "unauthenticated"), (MONITOR, 403, "forbidden")])
def test_openais_routes_refuse_in_its_shape(guarded: TestClient, path: str, key: str, status: int, code: str) -> None:
    answer = guarded.post(path, json={}, headers=bearer(key))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert answer.headers["www-authenticate"].startswith('Bearer realm="vitrine", error=')


def test_a_key_in_the_address_is_none(guarded: TestClient) -> None:
    """Addresses are written to logs by everything between a client and here."""
    assert guarded.post(f"/v1/classify?api_key={CLIENT}&access_token={CLIENT}", content=make_png()).status_code == 401


@pytest.mark.parametrize(
    ("key", "tasks", "figures"), [(CLIENT, 200, 403), (MONITOR, 403, 200), (ADMIN, 200, 200)], ids=["client", "monitor", "admin"]
)
def test_what_each_kind_may(guarded: TestClient, key: str, tasks: int, figures: int) -> None:
    answers = [
        (guarded.post("/v1/classify", content=make_png(), headers=bearer(key)), tasks),
        (guarded.get("/v1/models", headers=bearer(key)), tasks),
        (guarded.get("/metrics", headers=bearer(key)), figures),
    ]
    for answer, status in answers:
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["code"] == "forbidden"
            assert answer.headers["www-authenticate"] == 'Bearer realm="vitrine", error="insufficient_scope"'


@pytest.mark.parametrize("path", PAGES)
def test_what_is_open_without_a_key(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code in (200, 503)


def test_every_other_route_is_closed(guarded: TestClient) -> None:
    """A route that is added later is closed unless somebody opens it."""
    application = guarded.app
    assert isinstance(application, FastAPI)
    paths = {route.path for route in application.routes if isinstance(route, (Route, Mount))} | set(
        guarded.get("/openapi.json").json()["paths"]
    )
    assert {path for path in paths if is_open(f"{path}/" if "assets" in path else path)} == {
        *("/livez", "/readyz", "/docs", "/openapi.json", "/status"),
        *("/docs/assets", "/status/assets"),
    }
    for path in paths:
        if "assets" not in path and not is_open(path):
            assert guarded.get(path).status_code == 401, path


@pytest.mark.parametrize(
    "path", ["/livez/", "/Livez", "/status/assets/../../metrics", "/status/assets/%2e%2e/%2e%2e/metrics", "//metrics"]
)
def test_no_other_spelling_opens_a_route(guarded: TestClient, path: str) -> None:
    answer = guarded.get(path)
    assert answer.status_code in (401, 404)
    assert "vitrine_" not in answer.text


def test_the_description_asks_for_a_key(guarded: TestClient) -> None:
    document = guarded.get("/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "header"}
    secured = {
        path for path, operations in document["paths"].items() for operation in operations.values() if "security" in operation
    }
    assert secured == set(document["paths"]) - {"/livez", "/readyz"}
    assert {"401", "403"} <= document["paths"]["/v1/classify"]["post"]["responses"].keys()


def samples(text: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(text)
    return {
        (sample.labels["key"], sample.labels["code"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "vitrine_key_requests_total"
    }


def test_answers_are_counted_by_the_name_of_the_key(guarded: TestClient) -> None:
    before = samples(guarded.get("/metrics", headers=bearer(MONITOR)).text)
    guarded.post("/v1/classify", content=make_png(), headers=bearer(CLIENT))
    guarded.post("/v1/classify", content=b"nonsense", headers=bearer(CLIENT))
    guarded.get("/metrics", headers=bearer(CLIENT))
    guarded.post("/v1/classify", content=make_png(), headers=bearer(STRANGER))
    guarded.get("/livez")
    text = guarded.get("/metrics", headers=bearer(MONITOR)).text
    new = {labels: value - before.get(labels, 0) for labels, value in samples(text).items() if value != before.get(labels, 0)}
    assert new == {("photos", "200"): 1, ("photos", "415"): 1, ("photos", "403"): 1, ("", "401"): 1, ("scrape", "200"): 1}
    for secret in (CLIENT, MONITOR, STRANGER, PHOTOS.digest.hex(), PHOTOS.digest.hex()[:16]):
        assert secret not in text


def test_a_rate_is_of_one_key_alone(make_client: MakeClient) -> None:
    key, known = make_key("slow", rate="3/hour")
    client = make_client(api_keys=f"{known},{PHOTOS}")
    answers = [client.post("/v1/classify", content=make_png(), headers=bearer(key)) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].json()["code"] == "rate_limited"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 3600
    assert client.post("/v1/classify", content=make_png(), headers=bearer(CLIENT)).status_code == 200
    assert client.get("/livez", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(("processes", "answered"), [(1, 6), (2, 3), (4, 1), (100, 1)])
def test_a_rate_is_shared_out_among_processes(processes: int, answered: int) -> None:
    _, known = make_key("slow", rate="6/day")
    access = Access([known], processes=processes)
    refused = 0
    for _ in range(10):
        try:
            access.allow(known, "/v1/classify")
        except errors.RateLimitedError:
            refused += 1
    assert 10 - refused == answered


def test_keys_come_and_go_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{PHOTOS}\n")
    access = Access((OPS,), file)

    def known(key: str) -> bool:
        try:
            return access.identify({"x-api-key": key}) is not None
        except errors.UnauthenticatedError:
            return False

    assert [known(CLIENT), known(ADMIN), known(MONITOR)] == [True, True, False]
    replacement = tmp_path / "new"
    replacement.write_text(f"{SCRAPE}\n")
    replacement.replace(file)
    access.refresh()
    assert [known(CLIENT), known(ADMIN), known(MONITOR)] == [False, True, True]
    file.write_text("what is this")
    access.refresh()
    assert known(MONITOR), "a broken file changes nothing"
    file.unlink()
    access.refresh()
    assert known(MONITOR)
    file.write_text("")
    access.refresh()
    assert [known(MONITOR), known(ADMIN)] == [False, True]
    assert access.required


def test_an_empty_file_lets_nobody_in(make_client: MakeClient, tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    client = make_client(api_keys_file=tmp_path / "keys")
    assert client.get("/v1/models").status_code == 401
    assert client.get("/livez").status_code == 200


def admin_route(access: Access) -> TestClient:
    """One route behind the dependency alone, without the middleware."""
    app = FastAPI()
    api_errors.install(app)
    app.add_middleware(RequestIds)

    @app.post("/load")
    async def load(key: Annotated[ApiKey, Depends(access.admin)]) -> str:
        return key.name

    return TestClient(app)


def test_admin_routes_need_an_admin() -> None:
    client = admin_route(Access([PHOTOS, SCRAPE, OPS]))
    statuses = [client.post("/load", headers=headers).status_code for headers in ({}, *map(bearer, (STRANGER, CLIENT, MONITOR)))]
    assert statuses == [401, 401, 403, 403]
    allowed = client.post("/load", headers=bearer(ADMIN))
    assert (allowed.status_code, allowed.json()) == (200, "ops")


def test_admin_routes_are_off_without_keys() -> None:
    refused = admin_route(Access()).post("/load", headers=bearer(ADMIN))
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert "vitrine key" in refused.json()["detail"]


def test_a_stamp_sees_a_link_that_leads_elsewhere(tmp_path: Path) -> None:
    """As when an orchestrator replaces a mounted secret."""
    for name, key in (("old", PHOTOS), ("new", OPS)):
        (tmp_path / name).write_text(str(key))
        os.utime(tmp_path / name, ns=(1, 1))
    link = tmp_path / "keys"
    link.symlink_to(tmp_path / "old")
    access = Access((), link)
    (tmp_path / "next").symlink_to(tmp_path / "new")
    (tmp_path / "next").replace(link)
    access.refresh()
    assert access.identify({"x-api-key": ADMIN}) == OPS
