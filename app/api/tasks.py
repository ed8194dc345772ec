"""`POST /v1/TASK` for every task, generated from the table: admit, read, parse, run the pipeline, encode."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from app import metrics
from app.admission import Ticket
from app.api import schemas
from app.api.body import ImageUrl, Parsed, is_image, parse_body, read_body
from app.api.call import Call, server_timing
from app.api.errors import error_response, log_failure, problem
from app.api.fetch import fetch
from app.api.services import Services
from app.errors import CapacityError, InputError, InvalidValueError, VitrineError
from app.pipeline import Answer, Item
from app.tasks import TASKS
from app.tasks.base import AnyTask
from app.tasks.classify import ClassifyResult

Endpoint = Callable[[Request], Awaitable[Response]]

CLIENT_CLOSED_REQUEST = 499
PARSED_ON_THE_LOOP = 256 * 1024  # bytes


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


def task_endpoints(services: Services) -> dict[str, Endpoint]:
    """What answers `POST` on the path of every task."""
    return {f"/v1/{route.task.name}": _endpoint(route, services) for route in TASK_ROUTES}


def task_router(endpoints: Mapping[str, Endpoint]) -> APIRouter:
    """The routes of all tasks, with their description."""
    router = APIRouter(tags=["tasks"])
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.ProblemResponse} for status in (400, 404, 413, 415, 422, 429, 500, 503, 504)
    }
    for route in TASK_ROUTES:
        path = f"/v1/{route.task.name}"
        router.add_api_route(
            path,
            endpoints[path],
            methods=["POST"],
            summary=(route.task.__doc__ or route.task.name).splitlines()[0],
            operation_id=route.task.name,
            response_model=None,
            responses={200: {"model": route.response}, **problems},
            openapi_extra=_describe(route.request),
        )
    return router


def _endpoint(route: TaskRoute, services: Services) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        tracing, request_id = services.tracing, request.state.request_id
        trace = None if tracing is None else tracing.begin(f"/v1/{route.task.name}", request_id, request.headers)
        call = Call(request_id, route.task.name, trace)
        try:
            response = await _admitted(request, route, services, call)
            call.status = response.status_code
            return response
        finally:
            call.observe()

    return endpoint


async def _admitted(request: Request, route: TaskRoute, services: Services, call: Call) -> Response:
    """The answer or its error, with the time of every stage that was reached."""
    try:
        with services.admission.admit(call.id) as ticket:
            call.admit(ticket)
            response = await _answer(request, route, services, ticket)
    except VitrineError as error:
        if isinstance(error, CapacityError):
            metrics.count_refusal(error)
        response = error_response(error, call.id)
    except asyncio.CancelledError:
        if call.ticket is None or not call.ticket.departed:
            raise
        response = Response(status_code=CLIENT_CLOSED_REQUEST)
    if call.ticket is not None:
        response.headers["Server-Timing"] = server_timing(call.ticket.stages)
    return response


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


async def _answer(request: Request, route: TaskRoute, services: Services, ticket: Ticket) -> Response:
    with ticket.stage("read"):
        body = await read_body(request, ticket, services.admission, services.max_body_bytes)
    with ticket.stage("parse"):
        parsed = await _parse(body, request.headers.get("content-type", ""), services.max_images)
        asked = _validate(route.request, {**parsed.fields, **request.query_params})
    with _cancelled_by_departure(request, ticket):
        images = await _fetch_addresses(parsed.images, services, ticket)
        answer = await services.pipeline.run(route.task, asked.model, images, asked.options(), ticket)
    with ticket.stage("encode"):
        return _respond(route, answer, parsed, ticket)


async def _parse(body: bytes, content_type: str, max_images: int) -> Parsed:
    """Large forms and JSON leave the event loop; taking a raw body is nothing."""
    if len(body) > PARSED_ON_THE_LOOP and not is_image(body, content_type):
        return await asyncio.to_thread(parse_body, body, content_type, max_images)
    return parse_body(body, content_type, max_images)


async def _fetch_addresses(
    images: list[bytes | ImageUrl | InputError], services: Services, ticket: Ticket
) -> list[bytes | InputError]:
    """Images that came as an address are fetched together, within the request's time and the memory set aside for bodies."""
    if not any(isinstance(image, ImageUrl) for image in images):
        return [image for image in images if not isinstance(image, ImageUrl)]
    hold = partial(services.admission.take_bytes, ticket)

    async def get(image: bytes | ImageUrl | InputError) -> bytes | InputError:
        return await fetch(image.url, services.fetching, hold) if isinstance(image, ImageUrl) else image

    async with ticket.within_deadline():
        return list(await asyncio.gather(*(get(image) for image in images)))


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
    metrics.count_images(route.task.name, ticket.model, len(answer.items) - len(failed), failed)
    if len(failed) == len(answer.items) == 1:
        raise failed[0]
    body = {
        "id": ticket.id,
        "task": route.task.name,
        "model": answer.entry.manifest.model,
        "version": answer.entry.version,
        "warnings": _warnings(answer, parsed),
        "results": [_item(index, item, route, ticket.id) for index, item in enumerate(answer.items)],
    }
    status = 422 if len(failed) == len(answer.items) else 200
    return Response(orjson.dumps(body), status, media_type="application/json")


def _item(index: int, item: Item, route: TaskRoute, request_id: str) -> dict[str, Any]:
    image = {"image": vars(item.image)} if item.image is not None else {}
    if item.error is not None:
        log_failure(item.error, request_id)
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
