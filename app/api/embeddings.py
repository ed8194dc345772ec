"""`POST /v1/embeddings` in OpenAI's shape: texts, and images as data URLs or as `{"image": ...}`, to vectors."""

import base64
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.responses import Response

from app import metrics
from app.admission import Ticket
from app.api.admitted import admitted
from app.api.body import ImageUrl, json_image, read_body, read_json
from app.api.departure import cancelled_by_departure
from app.api.description import OPENAI_ERRORS, describe_document
from app.api.images import fetch_addresses
from app.api.openai_errors import OpenAIRoute, openai_error_response
from app.api.services import Services
from app.errors import InferenceError, InputError, InvalidValueError, MalformedRequestError, TooLargeError, VitrineError
from app.manifest import Entry
from app.tasks.embed import Embed, EmbedResult

PATH = "/v1/embeddings"
EMBED = Embed()
EXAMPLE = '{"model": "NAME", "input": ["a red circle"]}'
SentImage = bytes | ImageUrl | InputError


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200, description="NAME or NAME@VERSION")
    input: Annotated[list[Any], BeforeValidator(lambda value: value if isinstance(value, list) else [value])] = Field(
        min_length=1, description='a text, a data URL of an image, {"image": ...} with a data URL, or a list of them'
    )
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of float32, little-endian")
    dimensions: None = Field(None, description="not supported; the vectors have the model's own size")
    user: str | None = Field(None, description="not looked at")


class EmbeddingResponse(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    truncated: bool | None = Field(None, description="true of a text that was too long, and whose end was not read")


class UsageResponse(BaseModel):
    prompt_tokens: int = Field(description="of the texts; images count as none")
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingResponse]
    model: str
    usage: UsageResponse


def embeddings_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["openai"], route_class=OpenAIRoute)

    @router.post(
        PATH,
        summary="Embed texts and images, in OpenAI's shape",
        operation_id="embeddings",
        response_model=EmbeddingsResponse,
        responses=OPENAI_ERRORS,
        openapi_extra=describe_document(EmbeddingsRequest),
    )
    async def embeddings(request: Request) -> Response:
        answer = partial(_answer, services=services)
        return await admitted(request, services, path=PATH, task=EMBED.name, answer=answer, refuse=openai_error_response)

    return router


async def _answer(request: Request, ticket: Ticket, *, services: Services) -> Response:
    with ticket.stage("read"):
        body = await read_body(request, ticket, services.admission, services.max_body_bytes)
    with cancelled_by_departure(request, ticket):
        async with ticket.within_deadline():
            asked, texts, images = await services.pipeline.compute(
                "parse", ticket, partial(read_embeddings, body, services.max_images)
            )
            (entry,) = await services.pipeline.acquire(EMBED, asked.model, None, ticket)
            found = dict(zip(texts, await services.texts.embed(entry, [*texts.values()], ticket, field="input"), strict=True))
            found |= await _see(entry, images, services, ticket)
            return await services.pipeline.compute("encode", ticket, partial(_respond, asked, entry, found))


async def _see(
    entry: Entry, images: Mapping[int, SentImage], services: Services, ticket: Ticket
) -> dict[int, EmbedResult | VitrineError]:
    """The vectors of images, by their place in the input."""
    sources = await fetch_addresses([*images.values()], services, ticket)
    answer = await services.pipeline.run(EMBED, [entry], sources, None, ticket)
    failed = [item.error for item in answer.items if item.error is not None]
    metrics.count_images(EMBED.name, ticket.model, len(sources) - len(failed), failed)
    return {place: item.error or item.result for place, item in zip(images, answer.items, strict=True)}


def read_embeddings(body: bytes, max_images: int) -> tuple[EmbeddingsRequest, dict[int, str], dict[int, SentImage]]:
    """The request, and its texts and images by their place in the input.

    Raises:
        MalformedRequestError: no JSON, or something that is neither text nor image.
        InvalidValueError: a parameter that cannot be used.
        TooLargeError: too many images.
    """
    document = read_json(body, EXAMPLE)
    if document.get("dimensions") is not None:
        raise InvalidValueError("The vectors have the model's own size; leave dimensions out.", field="dimensions")
    unknown = next((name for name in document if name not in EmbeddingsRequest.model_fields), None)
    if unknown is not None:  # pydantic would tell of every one of them
        raise InvalidValueError(f"Unknown parameter {unknown!r}.", field=unknown)
    try:
        asked = EmbeddingsRequest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidValueError(f"{name}: {first['msg']}.", field=name) from error
    texts: dict[int, str] = {}
    images: dict[int, SentImage] = {}
    for place, value in enumerate(asked.input):
        if isinstance(value, dict) and value.keys() == {"image"}:
            images[place] = json_image(value["image"])
        elif isinstance(value, str) and value.startswith("data:image/"):
            images[place] = json_image(value)
        elif isinstance(value, str):
            texts[place] = value
        else:
            raise MalformedRequestError(
                f'input[{place}] is neither text nor image; send a string, a data URL or {{"image": ...}}. Token ids are not read.',
                field="input",
            )
    if len(images) > max_images:
        raise TooLargeError(f"{len(images)} images in one request; this server takes {max_images}.", field="input")
    return asked, texts, images


def _respond(asked: EmbeddingsRequest, entry: Entry, found: Mapping[int, EmbedResult | VitrineError]) -> Response:
    """All vectors, or the first error: OpenAI's shape has no place for one beside them."""
    results: list[EmbedResult] = []
    for place in range(len(asked.input)):
        one = found[place]
        if isinstance(one, InputError | InferenceError):
            where = f"input[{place}]: " if len(asked.input) > 1 else ""
            raise type(one)(f"{where}{one.detail}", field="input") from one
        if isinstance(one, VitrineError):
            raise one
        results.append(one)
    tokens = sum(result.tokens or 0 for result in results)
    body = {
        "object": "list",
        "data": [_row(place, result, asked.encoding_format) for place, result in enumerate(results)],
        "model": entry.manifest.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _row(place: int, result: EmbedResult, encoding: str) -> dict[str, Any]:
    embedding: Any = result.vector
    if encoding == "base64":
        embedding = base64.b64encode(np.ascontiguousarray(result.vector, "<f4").tobytes()).decode()
    row = {"object": "embedding", "index": place, "embedding": embedding}
    return row | {"truncated": True} if result.truncated else row
