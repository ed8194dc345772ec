"""Settings come from the environment, typed and ranged."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, available_cpus


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
    ],
)
def test_values_out_of_range(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"VITRINE_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings(_env_file=None)


def test_every_setting_says_what_it_is_or_is_plain() -> None:
    undescribed = {name for name, field in Settings.model_fields.items() if not field.description}
    assert undescribed == {"port", "log_level", "backend", "url_timeout"}


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
