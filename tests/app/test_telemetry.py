"""Traces as a receiver of OTLP/HTTP gets them: one span per request, its stages below it, within its time."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tritonclient.grpc import service_pb2, service_pb2_grpc

from app.admission import Ticket
from app.backends.triton import TritonBackend
from app.errors import BackendUnavailableError
from app.settings import Settings, _installed
from tests.factories import make_png
from tests.gateway import VITRINE, environment, free_port, gateway
from tests.repository import add_entry, make_images, make_repository

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Receiver:
    """A receiver of OTLP/HTTP that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.paths.add(self.path)
                receiver.requests.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Span]:
        return [
            span for request in self.requests for of in request.resource_spans for scope in of.scope_spans for span in scope.spans
        ]

    def resource(self) -> dict[str, str]:
        return {item.key: item.value.string_value for item in self.requests[0].resource_spans[0].resource.attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    thread.join()
    receiver.server.server_close()


def attributes(span: Span) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_request_is_a_span_with_its_stages_below(receiver: Receiver, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    began = time.time_ns()
    with gateway(repository, default_classify="colours", otlp_endpoint=receiver.url) as url:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "traced"}
        answers = [
            httpx2.post(f"{url}/v1/classify", content=make_png(), headers=headers),
            httpx2.post(f"{url}/v1/classify", files=[("image", make_png()), ("image", make_png())]),
            httpx2.post(f"{url}/v1/classify?model=nobodys", content=make_png()),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 404]
    ended = time.time_ns()

    assert receiver.paths == {"/v1/traces"}
    assert receiver.resource()["service.name"] == "vitrine"
    servers = sorted(
        (span for span in receiver.spans() if span.kind == Span.SPAN_KIND_SERVER), key=lambda span: span.start_time_unix_nano
    )
    assert [attributes(span)["http.response.status_code"] for span in servers] == [200, 200, 404]
    continued, batch, unknown = servers
    assert (continued.trace_id.hex(), continued.parent_span_id.hex()) == (TRACE, PARENT)
    assert continued.name == "POST /v1/classify"
    assert attributes(continued)["vitrine.request_id"] == "traced"
    assert attributes(continued)["vitrine.model"] == "colours"
    assert batch.trace_id.hex() != TRACE
    assert not batch.parent_span_id
    assert "vitrine.model" not in attributes(unknown)

    stages = ["read", "parse", "decode", "resize", "queue", "infer", "finish", "encode"]
    for server, names in ((continued, stages), (batch, stages), (unknown, ["read", "parse"])):
        below = sorted(
            (span for span in receiver.spans() if span.parent_span_id == server.span_id), key=lambda s: s.start_time_unix_nano
        )
        assert sorted(span.name for span in below) == sorted(names), "each stage once"
        assert {span.trace_id for span in below} == {server.trace_id}
        assert began < server.start_time_unix_nano < server.end_time_unix_nano < ended
        for span in below:
            assert server.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= server.end_time_unix_nano
        if server is continued:
            assert [span.name for span in below] == stages
            for earlier, later in pairwise(below):
                assert earlier.end_time_unix_nano <= later.start_time_unix_nano + 1000, (earlier.name, later.name)
    timing = dict(part.split(";dur=") for part in answers[0].headers["Server-Timing"].split(", "))
    for span in receiver.spans():
        if span.parent_span_id == continued.span_id and span.name in ("resize", "infer"):
            assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 == pytest.approx(float(timing[span.name]), abs=0.01)


def test_a_failure_of_the_server_is_marked(receiver: Receiver, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    (repository / "colours/1/model.onnx").write_bytes(b"no engine")
    port = free_port()
    variables = environment(repository=repository, port=port, default_classify="colours")
    variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.url + "/"
    variables["OTEL_SERVICE_NAME"] = "mine"
    process = subprocess.Popen(
        [VITRINE, "serve"], env=variables, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 30
        while True:
            try:
                response = httpx2.post(f"http://127.0.0.1:{port}/v1/classify", content=make_png())
                break
            except httpx2.ConnectError:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert response.status_code == 503
    finally:
        process.terminate()
        process.wait(30)
    assert receiver.resource()["service.name"] == "mine"
    server = next(span for span in receiver.spans() if span.kind == Span.SPAN_KIND_SERVER)
    assert server.status.code == Status.STATUS_CODE_ERROR


def test_a_receiver_that_is_away_harms_nobody(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    with gateway(repository, default_classify="colours", otlp_endpoint=f"http://127.0.0.1:{free_port()}") as url:
        assert httpx2.post(f"{url}/v1/classify", content=make_png()).status_code == 200
        ending = time.monotonic()
    assert time.monotonic() - ending < 15


@pytest.mark.anyio
async def test_triton_is_handed_the_trace(tmp_path: Path) -> None:
    """What arrives at the other end of the gRPC connection."""
    arrived: list[dict[str, str]] = []

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ModelInfer(self, request: service_pb2.ModelInferRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802 -- the name in the protocol
            arrived.append(dict(context.invocation_metadata()))
            context.abort(grpc.StatusCode.UNAVAILABLE, "no engine here")

    server = grpc.server(futures.ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    backend = TritonBackend(f"127.0.0.1:{port}")
    await backend.start()
    try:
        entry = add_entry(tmp_path / "repository")
        for context in ({"traceparent": f"00-{TRACE}-{PARENT}-01"}, None):
            with pytest.raises(BackendUnavailableError):
                await backend.infer(entry, {"image": make_images(1)}, Ticket(context=context))
    finally:
        await backend.close()
        server.stop(None)
    assert arrived[0]["traceparent"] == f"00-{TRACE}-{PARENT}-01"
    assert "traceparent" not in arrived[1]


def test_without_an_endpoint_nothing_is_imported() -> None:
    program = """
import sys
from app.main import create_app
from app.settings import Settings
create_app(Settings(_env_file=None))
print(*(name for name in sys.modules if name.startswith("opentelemetry.sdk") or name.startswith("opentelemetry.exporter")))
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("address", ["localhost:4318", "grpc://localhost:4317"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="http://"):
        Settings(_env_file=None, otlp_endpoint=address)


def test_packages_that_are_missing_are_seen() -> None:
    assert _installed("json", "email.message")
    assert not _installed("json", "opentelemetry.of.another.world")
    assert not _installed("nowhere.at.all")
