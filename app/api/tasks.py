"""`POST /v1/TASK` for every task of the table: admit, read, parse, run the pipeline, encode."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
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
from app.api.admitted import admitted
from app.api.body import Parsed, add_field, is_heavy, is_image, parse_body, read_body
from app.api.departure import cancelled_by_departure
from app.api.description import describe_request, describe_responses
from app.api.errors import error_response, log_failure, problem
from app.api.forms import COCO, JSON, embed_png, encode_drawn, origin
from app.api.images import fetch_addresses
from app.api.routes import TASK_ROUTES, TaskRoute
from app.api.services import Services
from app.api.tokens import parse_tokens, read_grids
from app.api.work import find_work
from app.errors import InvalidValueError, NotAcceptableError, VitrineError
from app.manifest import Entry
from app.pipeline import Answer, Draw, Item, Source
from app.tasks.tokenize import codebook_of

Endpoint = Callable[[Request], Awaitable[Response]]


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
        return await admitted(request, services, path=route.path, task=route.task.name, answer=answer, refuse=error_response)

    async def answer(request: Request, ticket: Ticket) -> Response:
        return await _answer(request, route, services, ticket)

    return endpoint


async def _answer(request: Request, route: TaskRoute, services: Services, ticket: Ticket) -> Response:
    with ticket.stage("read"):
        body = await read_body(request, ticket, services.admission, services.max_body_bytes)
    with ticket.stage("parse"):
        parsed = await _parse(route, body, request.headers.get("content-type", ""), services.max_images)
        asked = _validate(route.request, parsed.fields | _query(request))
        asked.check(len(parsed.images), services.max_images)
        options = asked.options()
    with cancelled_by_departure(request, ticket):
        async with ticket.within_deadline():
            work = await find_work(route.task, asked, options, services, ticket)
            sources = await _sources(parsed, asked, work.entries[0], services, ticket)
            form = _form(route, len(sources), request.headers.get("accept", ""), asked) if route.forms else JSON
            draw = _draw(route, form, asked)
            answer = await work.runner.run(work.task, work.entries, sources, work.options, ticket, draw=draw)
        failed = [item.error for item in answer.items if item.error is not None]
        metrics.count_images(route.task.name, ticket.model, len(answer.items) - len(failed), failed)
        answer = replace(answer, items=(*answer.items, *work.texts))
        failed += [item.error for item in work.texts if item.error is not None]
        warnings = [*_warnings(answer, parsed), *work.warnings]
    if form == JSON and not _heavy(route, asked):
        with ticket.stage("encode"):
            return _respond(route, answer, failed, warnings, ticket)
    write = (
        partial(_respond, route, answer, failed, warnings, ticket) if form == JSON else partial(_file, route, answer, form, asked)
    )
    async with ticket.within_deadline():
        return await services.pipeline.compute("encode", ticket, write)


async def _parse(route: TaskRoute, body: bytes, content_type: str, max_images: int) -> Parsed:
    """Large forms, those of many parts, JSON and token grids leave the event loop; taking a raw body is nothing."""
    parse = parse_tokens if route.takes == "tokens" else partial(parse_body, needs_image=route.takes == "images")
    if (route.takes == "tokens" or not is_image(body, content_type)) and is_heavy(body):
        return await asyncio.to_thread(parse, body, content_type, max_images)
    return parse(body, content_type, max_images)


async def _sources(
    parsed: Parsed, asked: schemas.TaskRequest, entry: Entry, services: Services, ticket: Ticket
) -> Sequence[Source]:
    """What the pipeline is to answer: one source per image, or per token grid."""
    if parsed.tokens is None or not isinstance(asked, schemas.DetokenizeRequest):
        return await fetch_addresses(parsed.images, services, ticket)
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


def _validate(schema: type[schemas.TaskRequest], fields: Mapping[str, Any]) -> schemas.TaskRequest:
    unknown = next((name for name in fields if name not in schema.model_fields), None)
    if unknown is not None:  # pydantic would tell of every one of them
        raise InvalidValueError(f"Unknown field {unknown!r}; known are {', '.join(schema.model_fields)}.", field=unknown)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidValueError(f"{name}: {first['msg']}.", field=name) from error


def _respond(route: TaskRoute, answer: Answer, failed: Sequence[VitrineError], warnings: Sequence[str], ticket: Ticket) -> Response:
    """200 with a result or an error per item. When every item failed: its own status for one, 422 for several."""
    if len(failed) == len(answer.items) == 1:
        raise failed[0]
    body = {
        "id": ticket.id,
        "task": route.task.name,
        "model": answer.entry.manifest.model,
        "version": answer.entry.version,
        "warnings": warnings,
        "results": [_item(index, item, route, ticket.id) for index, item in enumerate(answer.items)],
    }
    status = 422 if len(failed) == len(answer.items) else 200
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type=JSON)


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
