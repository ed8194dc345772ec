"""Traces over OTLP/HTTP, where an endpoint is set: a span per request, below it one per stage.

OpenTelemetry is imported only then. Its own variables hold too: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and the rest.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from app import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

Stretch = tuple[str, float, float]
"""A stage, when it began and when it ended, both of `time.perf_counter()`."""


class Tracing:
    """Makes traces and sends them in the background, in batches."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the base address of an OTLP/HTTP receiver, as in http://localhost:4318."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "vitrine"), "service.version": __version__}
        self._provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
        self._tracer = self._provider.get_tracer("vitrine", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, route: str, request_id: str, headers: Mapping[str, str]) -> "Trace":
        """The trace of one `POST` on `route`; it continues the one that `headers` (lower case) carry, if any."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415

        span = self._tracer.start_span(
            f"POST {route}",
            self._propagator.extract(headers),
            SpanKind.SERVER,
            {"http.request.method": "POST", "http.route": route, "url.path": route, "vitrine.request_id": request_id},
        )
        onward: dict[str, str] = {}
        self._propagator.inject(onward, set_span_in_context(span))
        return Trace(self._tracer, span, onward)

    def close(self) -> None:
        """Send what is left; blocks until it is sent or given up."""
        self._provider.shutdown()


class Trace:
    """The spans of one request. `onward` are the headers that hand the trace on to another server."""

    def __init__(self, tracer: "Tracer", span: "Span", onward: Mapping[str, str]) -> None:
        self.onward = onward
        self._tracer = tracer
        self._span = span
        self._epoch = time.time_ns() - time.perf_counter_ns()

    def end(self, status: int, model: str, stretches: Sequence[Stretch]) -> None:
        """Close the span of the request, with its HTTP status, and write those of its stages.

        The images of one request share the span of a stage: it reaches from the first that began to the last that ended.
        """
        from opentelemetry.trace import StatusCode, set_span_in_context  # noqa: PLC0415

        reach: dict[str, tuple[float, float]] = {}
        for stage, began, ended in stretches:
            first, last = reach.get(stage, (began, ended))
            reach[stage] = min(first, began), max(last, ended)
        context = set_span_in_context(self._span)
        for stage, (began, ended) in reach.items():
            self._tracer.start_span(stage, context, start_time=self._nanoseconds(began)).end(self._nanoseconds(ended))
        self._span.set_attribute("http.response.status_code", status)
        if model:
            self._span.set_attribute("vitrine.model", model)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _nanoseconds(self, moment: float) -> int:
        """A time of `time.perf_counter()` since 1970."""
        return self._epoch + int(moment * 1e9)
