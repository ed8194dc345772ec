"""Every metric of the gateway, as constants, and how a request writes to them.

Labels have values from bounded sets only: tasks, models that were found, stages, statuses, formats, codes of errors. With several
processes (`PROMETHEUS_MULTIPROC_DIR` is set when this is imported) each writes files of its own, and `exposition` adds them up.
"""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, get_args

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

from app import errors
from app.formats import Format

SEVERAL_PROCESSES = "PROMETHEUS_MULTIPROC_DIR" in os.environ
if SEVERAL_PROCESSES:
    # Workers are spawned, never forked: asking for the process id at every write would be a fifth of what metrics cost.
    PID = os.getpid()
    values.ValueClass = values.MultiProcessValue(lambda: PID)  # type: ignore[no-untyped-call]
disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads

STAGES = ("read", "parse", "decode", "resize", "queue", "infer", "finish", "encode")
FORMATS = (*get_args(Format), "unknown")
IMAGE_FAULTS = (
    errors.MalformedRequestError,
    errors.InvalidValueError,
    errors.TooLargeError,
    errors.UnsupportedMediaError,
    errors.UndecodableImageError,
    errors.InferenceError,
)
FAILURES_WITHOUT_MODEL = (429, 500, 503, 504)

REQUEST_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
STAGE_BUCKETS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 5.0, 30.0),
)
CHAT_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
BYTE_BUCKETS = [4.0**power for power in range(5, 14)]  # 1 KiB to 64 MiB
PIXEL_BUCKETS = [4.0**power for power in range(6, 14)]  # 64x64 to 8192x8192

REQUEST_SECONDS = Histogram(
    "vitrine_request_seconds", "Time from the ticket to the answer.", ("task", "model", "code"), buckets=REQUEST_BUCKETS
)
STAGE_SECONDS = Histogram(
    "vitrine_stage_seconds", "Time a request spent in a stage.", ("task", "model", "stage"), buckets=STAGE_BUCKETS
)
BATCH_SIZE = Histogram("vitrine_batch_size", "Rows of one inference.", ("engine",), buckets=BATCH_BUCKETS)
QUEUE_DEPTH = Gauge("vitrine_queue_depth", "Calls that wait for an engine.", ("engine",), multiprocess_mode="livesum")
IN_FLIGHT = Gauge("vitrine_requests_in_flight", "Requests that hold a ticket.", multiprocess_mode="livesum")
REJECTED = Counter("vitrine_rejected", "Requests refused because something is full, by what is.", ("reason",))
KEY_REQUESTS = Counter("vitrine_key_requests", "Answers where API keys are set, by the key's name.", ("key", "code"))
IMAGES = Counter("vitrine_images", "Images answered.", ("task", "model"))
IMAGE_BYTES = Histogram("vitrine_image_bytes", "Encoded size of an image that decoded.", buckets=BYTE_BUCKETS)
IMAGE_PIXELS = Histogram("vitrine_image_pixels", "Width x height of an image that decoded.", buckets=PIXEL_BUCKETS)
IMAGE_FAILURES = Counter("vitrine_image_failures", "Images without an answer, by the error's code.", ("code",))
DECODE_FAILURES = Counter("vitrine_decode_failures", "Images that did not decode, by what their bytes say they are.", ("format",))
MODEL_INFO = Gauge(
    "vitrine_model_info",
    "1 for each model version that is loaded.",
    ("model", "version", "engine", "precision"),
    multiprocess_mode="livemax",
)
MODEL_FAULTS = Gauge(
    "vitrine_model_faults",
    "Versions of a model that cannot serve; /v1/models says why.",
    ("model",),
    multiprocess_mode="livemax",
)
TEXTS = Counter("vitrine_texts", "Texts whose vectors were asked for, by whether they were still kept.", ("kept",))
TEXTS_EVICTED = Counter("vitrine_texts_evicted", "Texts whose vectors were given up for others.")
BACKEND_UP = Gauge(
    "vitrine_backend_up", "1 when the inference backend can compute.", ("backend",), multiprocess_mode="livemostrecent"
)
CIRCUIT_OPEN = Gauge(
    "vitrine_circuit_open",
    "1 while a Triton server does not answer and is left alone.",
    ("address",),
    multiprocess_mode="livemax",
)
CHAT_SECONDS = Histogram(
    "vitrine_chat_seconds",
    "Time from the question to the end of its answer.",
    ("model", "outcome"),
    buckets=CHAT_BUCKETS,
)
CHAT_FIRST_TOKEN_SECONDS = Histogram(
    "vitrine_chat_first_token_seconds", "Time from the question to the first token.", ("model",), buckets=FIRST_TOKEN_BUCKETS
)
CHAT_STREAMS = Gauge("vitrine_chat_streams", "Answers that grow side by side.", ("model",), multiprocess_mode="livesum")
CHAT_TOKENS = Counter("vitrine_chat_tokens", "Tokens of questions and of answers.", ("model", "kind"))

ChatOutcome = Literal["stop", "length", "other", "error", "cancelled"]
"""How an answer ended: by itself, at its limit, as only a server behind this one can end it, by a fault, or since nobody waited."""


class Level:
    """A gauge that is written only when its value changes."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._value = -1

    def set(self, value: int) -> None:
        if value != self._value:
            self._value = value
            self._gauge.set(value)


def observe_request(task: str, model: str, status: int, seconds: float, stages: Mapping[str, float]) -> None:
    """One request from its ticket to its answer; `stages` are those it reached, in seconds. `model` is "" when none was found."""
    _request(task, model, status).observe(seconds)
    children = _stages(task, model)
    for stage in STAGES:  # not over `stages`, to which a thread that is late for the deadline may still be adding
        if stage in stages:
            children[stage].observe(stages[stage])


def observe_chat(model: str, outcome: ChatOutcome, seconds: float, first: float | None, tokens: Mapping[str, int]) -> None:
    """One question to a chat model; `first` seconds went by before its first token, None where there was none. `tokens` by kind."""
    CHAT_SECONDS.labels(model, outcome).observe(seconds)
    if first is not None:
        CHAT_FIRST_TOKEN_SECONDS.labels(model).observe(first)
    for kind, count in tokens.items():
        CHAT_TOKENS.labels(model, kind).inc(count)


def observe_image(size: int, pixels: int) -> None:
    """One image that decoded: bytes of its file, width x height."""
    IMAGE_BYTES.observe(size)
    IMAGE_PIXELS.observe(pixels)


def count_images(task: str, model: str, answered: int, failed: Iterable[errors.VitrineError]) -> None:
    """The images of one request: how many have an answer, and the errors of the others."""
    _images(task, model).inc(answered)
    for error in failed:
        IMAGE_FAILURES.labels(error.code).inc()


def count_texts(hits: int, misses: int) -> None:
    """The texts of one request: how many vectors of them were kept from before, and how many were made."""
    TEXTS.labels("yes").inc(hits)
    TEXTS.labels("no").inc(misses)


def count_refusal(error: errors.CapacityError) -> None:
    REJECTED.labels(error.reason).inc()


def count_key(name: str, status: int) -> None:
    """One answer to a request with the key of that name; "" when it had none that is known."""
    _key(name, status).inc()


def count_undecodable(error: errors.InputError, image_format: str) -> None:
    """`image_format` is one of FORMATS. Images that only break a limit are no failures of decoding."""
    if isinstance(error, (errors.UndecodableImageError, errors.UnsupportedMediaError)):
        DECODE_FAILURES.labels(image_format).inc()


def begin(tasks: Iterable[str]) -> None:
    """Begin every series whose labels are known beforehand at zero, so that panels have data before the first error."""
    for reason in get_args(errors.Full):
        REJECTED.labels(reason)
    for error in IMAGE_FAULTS:
        IMAGE_FAILURES.labels(error.code)
    for image_format in FORMATS:
        DECODE_FAILURES.labels(image_format)
    count_texts(0, 0)
    for task in tasks:
        for status in FAILURES_WITHOUT_MODEL:
            _request(task, "", status)


def expect(task: str, model: str) -> None:
    """Begin the series of a model that is loaded at zero, so that rates are right from its first request on."""
    _request(task, model, 200)
    _stages(task, model)
    _images(task, model)


def exposition() -> bytes:
    """All metrics in Prometheus's text format; of every process of this gateway when there are several."""
    if not SEVERAL_PROCESSES:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


# Looking a child up by its labels costs more than writing to it.


@cache
def _request(task: str, model: str, status: int) -> Histogram:
    return REQUEST_SECONDS.labels(task, model, str(status))


@cache
def _stages(task: str, model: str) -> dict[str, Histogram]:
    return {stage: STAGE_SECONDS.labels(task, model, stage) for stage in STAGES}


@cache
def _images(task: str, model: str) -> Counter:
    return IMAGES.labels(task, model)


@cache
def _key(name: str, status: int) -> Counter:
    return KEY_REQUESTS.labels(name, str(status))
