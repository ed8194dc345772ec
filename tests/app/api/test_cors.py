"""Which pages may ask from a browser: none, unless their origin is listed."""

import pytest
from starlette.testclient import TestClient

from app.keys import make_key
from app.settings import Settings
from tests.app.api.conftest import MakeClient
from tests.factories import make_png

ORIGIN = "https://app.example.org"
KEY, KNOWN = make_key("app")
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def allowed(client: TestClient, origin: str = ORIGIN) -> list[str | None]:
    """What a browser is told: of the preflight, and with an answer and an error."""
    headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
    answers = [
        client.options("/v1/classify", headers=PREFLIGHT | {"Origin": origin}),
        client.post("/v1/classify", content=make_png(), headers=headers),
        client.post("/v1/classify", content=b"nonsense", headers=headers),
        client.post("/v1/classify", content=make_png(), headers={"Origin": origin}),
    ]
    return [answer.headers.get("access-control-allow-origin") for answer in answers]


def test_no_page_may_ask_by_default(client: TestClient) -> None:
    assert allowed(client) == [None] * 4


def test_listed_origins_may_ask_and_no_other(make_client: MakeClient) -> None:
    client = make_client(cors_origins=f"http://localhost:3000, {ORIGIN}", api_keys=str(KNOWN))
    assert allowed(client) == [ORIGIN] * 4
    for other in ("https://example.org", "http://app.example.org", f"{ORIGIN}.evil.example", "null"):
        assert allowed(client, other) == [None] * 4
    preflight = client.options("/v1/classify", headers=PREFLIGHT)
    assert preflight.status_code == 200, "asked without a key, before the key is sent"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    answer = client.post("/v1/classify", content=make_png(), headers={"Origin": ORIGIN, "X-API-Key": KEY})
    assert "access-control-allow-credentials" not in answer.headers, "keys are in headers; there are no cookies"
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]


def test_any_origin(make_client: MakeClient) -> None:
    client = make_client(cors_origins="*")
    assert client.get("/livez", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origin", ["app.example.org", "https://app.example.org/", "https://*.example.org", "ftp://example.org", "null"]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="an origin is"):
        Settings(_env_file=None, cors_origins=origin)
