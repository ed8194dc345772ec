"""`POST /v1/TASK` for every task of the table: admit, read, parse, run the pipeline, encode."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from app import metrics
from app.admission import Ticket
from app.api import schemas
from app.api.accept import choose
from app.api.body import ImageUrl, Parsed, add_field, is_image, parse_body, read_body
from app.api.call import Call, server_timing
from app.api.description import describe_request, describe_responses
from app.api.errors import error_response, log_failure, problem
from app.api.fetch import fetch
from app.api.forms import COCO, JSON, embed_png, encode_drawn, origin
from app.api.routes import TASK_ROUTES, TaskRoute
from app.api.services import Services
from app.api.tokens import parse_tokens, read_grids
from app.errors import CapacityError, InputError, InvalidValueError, NotAcceptableError, VitrineError
from app.manifest import Entry
from app.pipeline import Answer, Draw, Item, Source
from app.tasks.tokenize import codebook_of

Endpoint = Callable[[Request], Awaitable[Response]]

CLIENT_CLOSED_REQUEST = 499
PARSED_ON_THE_LOOP = 256 * 1024  # bytes


def task_endpoints(services: Services) -> dict[str, Endpoint]:
    """What answers `POST` on the path of every task."""
    return {route.path: _endpoint(route, services) for route in TASK_ROUTES}


def task_router(endpoints: Mapping[str, Endpoint]) -> APIRouter:
    """The routes of all tasks, with their description."""
    router = APIRouter(tags=["tasks"])
    for route in TASK_ROUTES:
        router.add_api_route(
            route.path,
            endpoints[route.path],
            methods=["POST"],
            summary=(route.task.__doc__ or route.task.name).splitlines()[0],
            operation_id=route.task.name,
            response_model=None,
            responses=describe_responses(route),
            openapi_extra=describe_request(route),
        )
    return router


def _endpoint(route: TaskRoute, services: Services) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        tracing, request_id = services.tracing, request.state.request_id
        trace = None if tracing is None else tracing.begin(route.path, request_id, request.headers)
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
        parsed = await _parse(route, body, request.headers.get("content-type", ""), services.max_images)
        asked = _validate(route.request, parsed.fields | _query(request))
        asked.check(len(parsed.images), services.max_images)
        options = asked.options()
    with _cancelled_by_departure(request, ticket):
        async with ticket.within_deadline():
            entries = await services.pipeline.acquire(route.task, asked.model, options, ticket)
            sources = await _sources(parsed, asked, entries[0], services, ticket)
            form = _form(route, len(sources), request.headers.get("accept", ""), asked) if route.forms else JSON
            draw = _draw(route, form, asked)
            answer = await services.pipeline.run(route.task, entries, sources, options, ticket, draw=draw)
        failed = [item.error for item in answer.items if item.error is not None]
        metrics.count_images(route.task.name, ticket.model, len(answer.items) - len(failed), failed)
    if form == JSON and not _heavy(route, asked):
        with ticket.stage("encode"):
            return _respond(route, answer, failed, parsed, ticket)
    write = partial(_respond, route, answer, failed, parsed, ticket) if form == JSON else partial(_file, route, answer, form, asked)
    async with ticket.within_deadline():
        return await services.pipeline.compute("encode", ticket, write)


async def _parse(route: TaskRoute, body: bytes, content_type: str, max_images: int) -> Parsed:
    """Large forms, JSON and token grids leave the event loop; taking a raw body is nothing."""
    parse = parse_tokens if route.takes == "tokens" else parse_body
    if len(body) > PARSED_ON_THE_LOOP and (route.takes == "tokens" or not is_image(body, content_type)):
        return await asyncio.to_thread(parse, body, content_type, max_images)
    return parse(body, content_type, max_images)


async def _sources(
    parsed: Parsed, asked: schemas.TaskRequest, entry: Entry, services: Services, ticket: Ticket
) -> Sequence[Source]:
    """What the pipeline is to answer: one source per image, or per token grid."""
    if parsed.tokens is None or not isinstance(asked, schemas.DetokenizeRequest):
        return await _fetch_addresses(parsed.images, services, ticket)
    return read_grids(parsed.tokens, asked.codebook, codebook_of(entry), services.max_images)


def _query(request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        add_field(fields, name, value)
    return fields


def _heavy(route: TaskRoute, asked: schemas.TaskRequest) -> bool:
    """Whether a JSON answer takes milliseconds to write."""
    masks = isinstance(asked, schemas.DetectRequest) and asked.masks
    return route.heavy or masks or (isinstance(asked, schemas.DrawnRequest) and asked.render)


def _draw(route: TaskRoute, form: str, asked: schemas.TaskRequest) -> Draw | None:
    """What draws the results onto their images, where the form or the request wants that."""
    if route.marks is None or not isinstance(asked, schemas.DrawnRequest):
        return None
    kind = route.forms[form].draws if form != JSON else "PNG" if asked.render else None
    return None if kind is None else partial(encode_drawn, marks=route.marks, kind=kind, quality=asked.quality)


def _form(route: TaskRoute, count: int, accept: str, asked: schemas.TaskRequest) -> str:
    """The media type to answer in: what `accept` likes best of what can hold `count` results; what JSON it is the request may say.

    Raises:
        NotAcceptableError: it likes none of them.
    """
    fitting = [JSON, *(media_type for media_type, form in route.forms.items() if count == 1 or not form.single)]
    if (chosen := choose(accept, fitting)) is not None:
        return COCO if chosen == JSON and isinstance(asked, schemas.DetectRequest) and asked.format == "coco" else chosen
    if (single := choose(accept, [*route.forms])) is not None:
        raise NotAcceptableError(
            f"{count} images do not fit into one {single}; ask for {' or '.join(fitting)}, or send one at a time.", field="Accept"
        )
    raise NotAcceptableError(f"Accept takes nothing that there is: {', '.join([JSON, *route.forms])}.", field="Accept")


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


def _validate(schema: type[schemas.TaskRequest], fields: Mapping[str, Any]) -> schemas.TaskRequest:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(schema.model_fields)
        detail = f"Unknown field {name!r}; known are {known}." if first["type"] == "extra_forbidden" else f"{name}: {first['msg']}."
        raise InvalidValueError(detail, field=name) from error


def _respond(route: TaskRoute, answer: Answer, failed: Sequence[VitrineError], parsed: Parsed, ticket: Ticket) -> Response:
    """200 with a result or an error per item. When every item failed: its own status for one, 422 for several."""
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
    return Response(orjson.dumps(body), status, media_type=JSON)


def _file(route: TaskRoute, answer: Answer, media_type: str, asked: schemas.TaskRequest) -> Response:
    """All results in one file, or the error of the first item that has none: a file has no place for it."""
    for index, item in enumerate(answer.items):
        if item.error is not None and len(answer.items) > 1:
            raise type(item.error)(f"Image {index}, counted from 0: {item.error.detail}", field=item.error.field) from item.error
        if item.error is not None:
            raise item.error
    form, results = route.forms[media_type], [item.result for item in answer.items]
    headers = origin(answer.entry) | route.headers(results)
    content = form.encode(results if form.draws is None else [item.drawn for item in answer.items], asked)
    return Response(content, headers=headers, media_type=media_type)


def _item(index: int, item: Item, route: TaskRoute, request_id: str) -> dict[str, Any]:
    image = {"image": vars(item.image)} if item.image is not None else {}
    if item.error is not None:
        log_failure(item.error, request_id)
        return {"index": index, **image, "error": problem(item.error)}
    drawn = {}
    if item.drawn is not None and item.image is not None:
        drawn = {"rendered": embed_png(item.drawn, item.image.width, item.image.height)}
    return {"index": index, **image, **route.encode(item.result), **drawn}


GENERIC_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded", "image/*")


def _warnings(answer: Answer, parsed: Parsed) -> list[str]:
    """A Content-Type that says otherwise is reported, not believed; what clients send by default says nothing."""
    declared, image = parsed.declared, answer.items[0].image
    if parsed.tokens is not None:
        actual = parsed.tokens.media_type
    elif image is not None:
        actual = f"image/{image.format.lower()}"
    else:
        return []
    if declared is None or declared in GENERIC_TYPES:
        return []
    if declared.replace("image/jpg", "image/jpeg").replace("image/x-", "image/") == actual:
        return []
    return [f"Content-Type is {declared}, but the body is {actual}; it was read as what it is."]
