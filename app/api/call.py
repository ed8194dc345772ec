"""One request from its ticket to its end: the time it asks for, and what is told of it to the metrics and to the client."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from app import metrics
from app.admission import Ticket
from app.api.departure import CLIENT_CLOSED_REQUEST
from app.errors import InvalidValueError
from app.telemetry import Trace

TIMEOUT_HEADER = "X-Request-Timeout"


def asked_timeout(headers: Mapping[str, str]) -> float | None:
    """Seconds that the client gives its request in the header `X-Request-Timeout`; None when it does not say.

    Raises:
        InvalidValueError: it says something else than a positive number.
    """
    said = headers.get(TIMEOUT_HEADER)
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidValueError(f"{TIMEOUT_HEADER} is a number of seconds above 0, as in 2.5.", field=TIMEOUT_HEADER)
    return seconds


@dataclass
class Call:
    """One request to a task. `ticket` is None until it is admitted, and 500 is what nobody foresaw.

    Whatever its `status`, a request whose client hung up counts as 499.
    """

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
        status = CLIENT_CLOSED_REQUEST if ticket is not None and ticket.departed else self.status
        if ticket is None:
            metrics.observe_request(self.task, "", status, seconds, {})
        else:
            metrics.observe_request(self.task, ticket.model, status, seconds, ticket.stages)
        if self.trace is not None:
            model, spans = ("", ()) if ticket is None else (ticket.model, ticket.spans or ())
            self.trace.end(status, model, spans)


def server_timing(stages: Mapping[str, float]) -> str:
    """The header `Server-Timing`: milliseconds per stage that was reached, in the order of `metrics.STAGES`."""
    return ", ".join([f"{stage};dur={1000 * stages[stage]:.3f}" for stage in metrics.STAGES if stage in stages])
