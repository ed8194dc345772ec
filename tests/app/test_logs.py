"""The log as JSON: one object per line, the request's id in what is logged on its behalf."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app import logs
from tests.factories import make_png
from tests.gateway import gateway
from tests.repository import add_entry


def formatted(**fields: Any) -> dict[str, Any]:
    record = logging.makeLogRecord(
        {"name": "vitrine.some", "levelname": "WARNING", "levelno": 30, "msg": "%s ü", "args": ("a",)} | fields
    )
    assert logs.add_request_id(record)
    line = logs.json_formatter().format(record)
    assert "\n" not in line
    return json.loads(line)


def test_a_record_has_these_fields() -> None:
    record = formatted()
    assert record.pop("time").endswith("+00:00")
    assert record == {"level": "WARNING", "logger": "vitrine.some", "message": "a ü"}


def test_the_exception_is_one_field() -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        record = formatted(exc_info=sys.exc_info())
    assert record["exception"].startswith("Traceback")
    assert record["exception"].endswith("ValueError: inside")


def test_the_id_of_the_request_is_on_the_record() -> None:
    token = logs.REQUEST_ID.set("one-two")
    try:
        assert formatted()["request_id"] == "one-two"
    finally:
        logs.REQUEST_ID.reset(token)
    assert "request_id" not in formatted()


def test_uvicorns_colours_are_left_out() -> None:
    assert "color_message" not in formatted(color_message="\x1b[1ma")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_failing_request_is_found_by_its_id(tmp_path: Path, log_format: str) -> None:
    repository = tmp_path / "repository"
    engine = add_entry(repository).path / "model.onnx"
    add_entry(repository, "other")
    with gateway(repository, default_classify="other", log_format=log_format, log_level="info") as url:
        engine.write_bytes(b"no engine")
        response = httpx2.post(f"{url}/v1/classify?model=colours", content=make_png(), headers={"X-Request-ID": "find-me"})
        assert response.status_code == 503
    lines = (tmp_path / "gateway.log").read_text().splitlines()
    found = [line for line in lines if "find-me" in line]
    assert found
    if log_format == "text":
        assert all("{" not in line[:1] for line in lines)
        return
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert {"vitrine.api", "vitrine.catalog"} <= {record["logger"] for record in records if record.get("request_id") == "find-me"}
    assert "uvicorn.error" in {record["logger"] for record in records}
    assert all(record.keys() >= {"time", "level", "logger", "message"} for record in records)
