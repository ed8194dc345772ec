"""Series exist before they are needed, labels stay bounded, edges lie where targets are, and it costs little."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import metrics
from app.api.call import server_timing
from app.errors import CapacityError, InvalidValueError, TooLargeError, UndecodableImageError, UnsupportedMediaError
from app.tasks import TASKS

ROOT = Path(__file__).parents[2]
NAMES = {
    "vitrine_request_seconds": {"task", "model", "code"},
    "vitrine_stage_seconds": {"task", "model", "stage"},
    "vitrine_batch_size": {"engine"},
    "vitrine_queue_depth": {"engine"},
    "vitrine_requests_in_flight": set(),
    "vitrine_rejected_total": {"reason"},
    "vitrine_key_requests_total": {"key", "code"},
    "vitrine_images_total": {"task", "model"},
    "vitrine_chat_seconds": {"model", "outcome"},
    "vitrine_chat_first_token_seconds": {"model"},
    "vitrine_chat_tokens_total": {"model", "kind"},
    "vitrine_chat_streams": {"model"},
    "vitrine_image_bytes": set(),
    "vitrine_image_pixels": set(),
    "vitrine_image_failures_total": {"code"},
    "vitrine_decode_failures_total": {"format"},
    "vitrine_model_info": {"model", "version", "engine", "precision"},
    "vitrine_texts_total": {"kept"},
    "vitrine_texts_evicted_total": set(),
    "vitrine_model_faults": {"model"},
    "vitrine_backend_up": {"backend"},
    "vitrine_circuit_open": {"address"},
}


def samples() -> dict[tuple[str, frozenset[Any]], float]:
    """Every sample of this process by its name and labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(name: str, **labels: str) -> float | None:
    return samples().get((name, frozenset(labels.items())))


def test_names_and_labels_are_those_that_dashboards_ask_for() -> None:
    metrics.begin(TASKS)
    metrics.expect("classify", "some")
    metrics.observe_request("classify", "some", 200, 0.01, {})
    metrics.observe_chat("some", "stop", 1.0, 0.1, {"prompt": 3, "completion": 2})
    metrics.CHAT_STREAMS.labels("some").set(0)
    for engine in (metrics.BATCH_SIZE, metrics.QUEUE_DEPTH):
        engine.labels("some@1")
    metrics.MODEL_INFO.labels("some", "1", "fake", "fp32").set(0)
    metrics.MODEL_FAULTS.labels("some").set(0)
    metrics.BACKEND_UP.labels("some").set(0)
    metrics.CIRCUIT_OPEN.labels("some").set(0)
    metrics.KEY_REQUESTS.labels("some", "200")
    found: dict[str, set[str]] = {}
    for name, labels in samples():
        base = name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
        found.setdefault(base, set()).update(label for label, _ in labels if label != "le")
    assert {name: labels for name, labels in found.items() if name.startswith("vitrine_")} == NAMES


def test_series_begin_at_zero_before_the_first_error() -> None:
    metrics.begin(["begun"])
    metrics.expect("begun", "fresh")
    for reason in ("requests", "bytes", "queue", "upstream"):
        assert value("vitrine_rejected_total", reason=reason) is not None
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC", "unknown"):
        assert value("vitrine_decode_failures_total", format=image_format) is not None
    for code in ("undecodable_image", "unsupported_media", "too_large", "inference_failed"):
        assert value("vitrine_image_failures_total", code=code) is not None
    assert value("vitrine_request_seconds_count", task="begun", model="fresh", code="200") == 0
    assert value("vitrine_request_seconds_count", task="begun", model="", code="500") == 0
    assert value("vitrine_images_total", task="begun", model="fresh") == 0
    for stage in ("read", "parse", "decode", "resize", "queue", "infer", "finish", "encode"):
        assert value("vitrine_stage_seconds_count", task="begun", model="fresh", stage=stage) == 0


def test_edges_lie_on_the_targets_and_are_close_below_5_ms() -> None:
    for buckets in (metrics.REQUEST_BUCKETS, metrics.STAGE_BUCKETS):
        assert {0.015, 0.05} <= set(buckets)
        assert len([edge for edge in buckets if edge <= 0.005]) >= 7


def test_a_request_is_written_once() -> None:
    metrics.observe_request("once", "m", 200, 0.012, {"decode": 0.004, "infer": 0.001})
    assert value("vitrine_request_seconds_bucket", task="once", model="m", code="200", le="0.015") == 1
    assert value("vitrine_request_seconds_bucket", task="once", model="m", code="200", le="0.01") == 0
    assert value("vitrine_stage_seconds_sum", task="once", model="m", stage="decode") == 0.004
    assert value("vitrine_stage_seconds_count", task="once", model="m", stage="resize") == 0


def test_what_is_full_is_the_reason() -> None:
    before = value("vitrine_rejected_total", reason="bytes") or 0
    metrics.count_refusal(CapacityError("full", reason="bytes"))
    assert value("vitrine_rejected_total", reason="bytes") == before + 1


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (UndecodableImageError("x"), 1),
        (UnsupportedMediaError("x"), 1),
        (TooLargeError("x"), 0),
        (InvalidValueError("x"), 0),
    ],
)
def test_only_what_does_not_decode_counts_as_such(error: Any, counted: int) -> None:
    metrics.begin(())
    before = value("vitrine_decode_failures_total", format="GIF") or 0
    metrics.count_undecodable(error, "GIF")
    assert value("vitrine_decode_failures_total", format="GIF") == before + counted


def test_server_timing_is_in_milliseconds() -> None:
    assert server_timing({"read": 0.00025, "decode": 0.0123456}) == "read;dur=0.250, decode;dur=12.346"


def test_the_cost_is_measured_and_a_limit_can_be_missed() -> None:
    """The figure is for a quiet machine; here it is only known to be measured, and that the limit counts."""
    script = [sys.executable, ROOT / "load_tests/overhead.py", "--limit"]
    done = subprocess.run([*script, "1000"], capture_output=True, text=True, check=True)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["one process", "several processes"]
    assert subprocess.run([*script, "1"], capture_output=True, check=False).returncode == 1
