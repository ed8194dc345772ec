"""What lies around the answer to one request for inference: admission, metrics, the trace, and errors in the route's own shape."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from fastapi import Request
from starlette.responses import Response

from app import metrics
from app.admission import Ticket
from app.api.call import Call, asked_timeout, server_timing
from app.api.departure import CLIENT_CLOSED_REQUEST
from app.api.services import Services
from app.api.sse import EventStream
from app.errors import CapacityError, VitrineError

Answer = Callable[[Request, Ticket], Awaitable[Response]]
Refuse = Callable[[VitrineError, str], Response]
"""An error and the id of the request -> the answer that tells of it."""


async def admitted(request: Request, services: Services, *, path: str, task: str, answer: Answer, refuse: Refuse) -> Response:
    """`answer` within a ticket, or its error, with the time of every stage that was reached; `path` names the trace.

    A stream keeps the ticket until it is over.
    """
    tracing, request_id = services.tracing, request.state.request_id
    trace = None if tracing is None else tracing.begin(path, request_id, request.headers)
    call = Call(request_id, task, trace)
    with ExitStack() as held:
        held.callback(call.observe)
        try:
            ticket = held.enter_context(services.admission.admit(call.id, asked_timeout(request.headers)))
            call.admit(ticket)
            response = await answer(request, ticket)
        except VitrineError as error:
            if isinstance(error, CapacityError):
                metrics.count_refusal(error)
            response = refuse(error, call.id)
        except asyncio.CancelledError:
            if call.ticket is None or not call.ticket.departed:
                raise
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        if call.ticket is not None:
            response.headers["Server-Timing"] = server_timing(call.ticket.stages)
        call.status = response.status_code
        if isinstance(response, EventStream):
            response.held.push(held.pop_all())
        return response
