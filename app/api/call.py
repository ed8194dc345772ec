"""What is told of one request when it is over: its metrics and the times of its stages to the client."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from app import metrics
from app.admission import Ticket
from app.telemetry import Trace


@dataclass
class Call:
    """One request to a task. `ticket` is None until it is admitted, and 500 is what nobody foresaw."""

    id: str
    task: str
    trace: Trace | None = None
    ticket: Ticket | None = None
    status: int = 500
    started: float = field(default_factory=time.perf_counter)

    def admit(self, ticket: Ticket) -> None:
        """The request has got its ticket."""
        self.ticket = ticket
        if self.trace is not None:
            ticket.spans = []
            ticket.context = self.trace.onward

    def observe(self) -> None:
        """Write to the metrics of requests and stages, and end the trace."""
        seconds = time.perf_counter() - self.started
        ticket = self.ticket
        if ticket is None:
            metrics.observe_request(self.task, "", self.status, seconds, {})
        else:
            metrics.observe_request(self.task, ticket.model, self.status, seconds, ticket.stages)
        if self.trace is not None:
            model, spans = ("", ()) if ticket is None else (ticket.model, ticket.spans or ())
            self.trace.end(self.status, model, spans)


def server_timing(stages: Mapping[str, float]) -> str:
    """The header `Server-Timing`: milliseconds per stage that was reached, in the order of `metrics.STAGES`."""
    return ", ".join([f"{stage};dur={1000 * stages[stage]:.3f}" for stage in metrics.STAGES if stage in stages])
