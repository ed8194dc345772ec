"""Settings come from the environment, typed and ranged."""

import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.keys import make_key
from app.settings import Settings, available_cpus, warn_if_open


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_PORT", "9000")
    monkeypatch.setenv("VITRINE_REPOSITORY", "/models")
    monkeypatch.setenv("VITRINE_URL_HOSTS", "a.example, b.example")
    settings = Settings(_env_file=None)
    assert (settings.port, settings.repository, settings.url_hosts) == (9000, Path("/models"), ("a.example", "b.example"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("BACKEND", "magic"),
        ("MAX_IMAGES", "0"),
        ("REQUEST_TIMEOUT", "-1"),
        ("THREADS", "many"),
        ("TRITON_URL", "http://host"),
        ("URL_NETWORKS", "10.1.0.0/33"),
        ("URL_NETWORKS", "internal.example"),
        ("API_KEYS", "vitrine_pasted"),
        ("API_KEYS_FILE", "/nowhere/keys"),
        ("TLS_CERTFILE", "/nowhere/cert.pem"),
        ("TLS_KEYFILE", "/nowhere/key.pem"),
    ],
)
def test_values_out_of_range(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"VITRINE_{name}", value)
    with pytest.raises(ValidationError, match="tls_keyfile" if name.startswith("TLS") else name.lower()) as caught:
        Settings(_env_file=None)
    assert "pasted" not in str(caught.value)


def test_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_URL_NETWORKS", "10.1.0.0/16, fd00::/8,192.168.0.7")
    networks = Settings(_env_file=None).url_networks
    assert networks == (IPv4Network("10.1.0.0/16"), IPv6Network("fd00::/8"), IPv4Network("192.168.0.7"))


@pytest.mark.parametrize(
    ("host", "given", "warned"),
    [
        ("127.0.0.1", {}, False),
        ("127.0.0.2", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("192.168.0.7", {}, True),
        ("gateway.example", {}, True),
        ("0.0.0.0", {"api_keys": str(make_key("a")[1])}, False),
    ],
)
def test_a_gateway_that_everyone_may_ask_says_so(
    host: str, given: dict[str, str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_open(Settings(_env_file=None, host=host, **given))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert ("VITRINE_API_KEYS" in caplog.text) == warned


def test_every_setting_says_what_it_is_or_is_plain() -> None:
    undescribed = {name for name, field in Settings.model_fields.items() if not field.description}
    assert undescribed == {"port", "log_level", "backend"}


def test_cpus_are_those_of_this_process() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def test_a_variable_meant_for_others_stops_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    assert Settings(_env_file=None).otlp_endpoint == ""
    assert "nothing is traced" in caplog.text
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    monkeypatch.setenv("VITRINE_OTLP_ENDPOINT", "collector:4317")
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        Settings(_env_file=None)
