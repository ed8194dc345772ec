"""`POST /v1/TASK` for every task, generated from the table: admit, read, parse, run the pipeline, encode."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from app import metrics
from app.admission import Ticket
from app.api import schemas
from app.api.body import ImageUrl, Parsed, parse_body, read_body
from app.api.errors import error_response, problem
from app.api.fetch import fetch
from app.api.services import Services
from app.errors import CapacityError, InvalidValueError, TooLargeError, VitrineError
from app.pipeline import Answer, Item
from app.tasks import TASKS
from app.tasks.base import AnyTask
from app.tasks.classify import ClassifyResult

CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class TaskRoute:
    """How one task speaks HTTP. `encode` gives the members of one result."""

    task: AnyTask
    request: type[schemas.ClassifyRequest]
    response: type[schemas.TaskResponse]
    encode: Callable[[Any], dict[str, Any]]


def encode_classify(result: ClassifyResult) -> dict[str, Any]:
    return {"predictions": [vars(prediction) for prediction in result.predictions]}


TASK_ROUTES = (TaskRoute(TASKS["classify"], schemas.ClassifyRequest, schemas.ClassifyResponse, encode_classify),)


def task_router(services: Services) -> APIRouter:
    """`POST /v1/TASK` for every task."""
    router = APIRouter(prefix="/v1", tags=["tasks"])
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.ProblemResponse} for status in (400, 404, 413, 415, 422, 429, 500, 503, 504)
    }
    for route in TASK_ROUTES:
        router.add_api_route(
            f"/{route.task.name}",
            _endpoint(route, services),
            methods=["POST"],
            summary=(route.task.__doc__ or route.task.name).splitlines()[0],
            operation_id=route.task.name,
            response_model=None,
            responses={200: {"model": route.response}, **problems},
            openapi_extra=_describe(route.request),
        )
    return router


def _endpoint(route: TaskRoute, services: Services) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        started = time.perf_counter()
        request_id = request.state.request_id
        labels = _Labels(route.task.name)
        try:
            with services.admission.admit(request_id) as ticket:
                response = await _answer(request, route, services, ticket, labels)
        except VitrineError as error:
            if isinstance(error, CapacityError):
                metrics.REJECTED.labels(error.code).inc()
            response = error_response(error, request_id)
        except asyncio.CancelledError:
            if not ticket.departed:
                raise
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        seconds = time.perf_counter() - started
        metrics.REQUEST_SECONDS.labels(labels.task, labels.model, str(response.status_code)).observe(seconds)
        return response

    return endpoint


@dataclass
class _Labels:
    """What the metrics call this request; the model is known only once it was found."""

    task: str
    model: str = ""


@contextmanager
def _cancelled_by_departure(request: Request, ticket: Ticket) -> Iterator[None]:
    """Watch for the client to hang up (its body is read already); then the ticket is void and the work is cancelled."""
    working = asyncio.current_task()

    def hung_up(_: "asyncio.Task[Any]") -> None:
        ticket.departed = ticket.cancelled = True
        if working is not None:
            working.cancel()

    watcher = asyncio.ensure_future(request.receive())
    watcher.add_done_callback(hung_up)
    try:
        yield
    finally:
        watcher.remove_done_callback(hung_up)
        watcher.cancel()


async def _answer(request: Request, route: TaskRoute, services: Services, ticket: Ticket, labels: _Labels) -> Response:
    with ticket.stage("read"):
        body = await read_body(request, ticket, services.admission, services.max_body_bytes)
    with ticket.stage("parse"):
        parsed = parse_body(body, request.headers.get("content-type", ""))
        asked = _validate(route.request, {**parsed.fields, **request.query_params})
        if len(parsed.images) > services.max_images:
            raise TooLargeError(
                f"{len(parsed.images)} images in one request; this server takes {services.max_images}.", field="image"
            )
    with _cancelled_by_departure(request, ticket):
        images = [await fetch(image.url, services.fetching) if isinstance(image, ImageUrl) else image for image in parsed.images]
        answer = await services.pipeline.run(route.task, asked.model, images, asked.options(), ticket)
    labels.model = answer.entry.manifest.model
    with ticket.stage("encode"):
        response = _respond(route, answer, parsed, ticket)
    for stage, seconds in ticket.stages.items():
        metrics.STAGE_SECONDS.labels(stage).observe(seconds)
    response.headers["Server-Timing"] = ", ".join(f"{stage};dur={1000 * spent:.3f}" for stage, spent in ticket.stages.items())
    return response


def _validate(schema: type[schemas.ClassifyRequest], fields: Mapping[str, Any]) -> schemas.ClassifyRequest:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(schema.model_fields)
        detail = f"Unknown field {name!r}; known are {known}." if first["type"] == "extra_forbidden" else f"{name}: {first['msg']}."
        raise InvalidValueError(detail, field=name) from error


def _respond(route: TaskRoute, answer: Answer, parsed: Parsed, ticket: Ticket) -> Response:
    """200 with a result or an error per image. When every image failed: its own status for one, 422 for several."""
    failed = [item.error for item in answer.items if item.error is not None]
    if len(failed) == len(answer.items) == 1:
        raise failed[0]
    body = {
        "id": ticket.id,
        "task": route.task.name,
        "model": answer.entry.manifest.model,
        "version": answer.entry.version,
        "warnings": _warnings(answer, parsed),
        "results": [_item(index, item, route) for index, item in enumerate(answer.items)],
    }
    status = 422 if len(failed) == len(answer.items) else 200
    return Response(json.dumps(body, ensure_ascii=False).encode(), status, media_type="application/json")


def _item(index: int, item: Item, route: TaskRoute) -> dict[str, Any]:
    image = {"image": vars(item.image)} if item.image is not None else {}
    if item.error is not None:
        return {"index": index, **image, "error": problem(item.error)}
    return {"index": index, **image, **route.encode(item.result)}


GENERIC_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded", "image/*")


def _warnings(answer: Answer, parsed: Parsed) -> list[str]:
    """A Content-Type that says otherwise is reported, not believed; what clients send by default says nothing."""
    image = answer.items[0].image
    declared = parsed.declared
    if image is None or declared is None or declared in GENERIC_TYPES:
        return []
    actual = f"image/{image.format.lower()}"
    if declared.replace("image/jpg", "image/jpeg").replace("image/x-", "image/") == actual:
        return []
    return [f"Content-Type is {declared}, but the body is {actual}; it was read as what it is."]


def _describe(request: type[schemas.TaskRequest]) -> dict[str, Any]:
    """The OpenAPI of the three forms of a body, which the routes read themselves."""
    properties = request.model_json_schema()["properties"]
    binary = {"type": "string", "format": "binary"}
    image = {
        "description": 'base64, data URL or address; as {"base64": ...}, {"url": ...} or a data URL',
        "anyOf": [{"type": "string"}, schemas.Base64Image.model_json_schema(), schemas.UrlImage.model_json_schema()],
    }
    form = {"type": "object", "required": ["image"], "properties": {"image": {"type": "array", "items": binary}, **properties}}
    document = {"type": "object", "properties": {"image": image, "images": {"type": "array", "items": image}, **properties}}
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.get("description", "")}
            for name, schema in properties.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": {"schema": binary},
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": document},
            },
        },
    }
