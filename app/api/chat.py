"""`POST /v1/chat/completions` in OpenAI's shape: read, check, ask whoever answers, and pass the answer on as it grows."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from app.admission import Ticket
from app.api.admitted import admitted
from app.api.body import PARSED_ON_THE_LOOP, ImageUrl, json_image, read_body, read_json
from app.api.chat_schemas import ChatCompletionResponse, ChatRequest, read_chat
from app.api.departure import cancelled_by_departure
from app.api.description import OPENAI_ERRORS, describe_document
from app.api.errors import log_failure
from app.api.exchange import Answerer, Exchange, Question, SentImage
from app.api.images import fetch_addresses
from app.api.openai_errors import UNFORESEEN, ErrorsResponse, OpenAIRoute, openai_error, openai_error_response
from app.api.services import Services
from app.api.sse import DONE, EventStream, encode_event
from app.chat import TASK
from app.errors import InputError, VitrineError

log = logging.getLogger("vitrine.chat")

PATH = "/v1/chat/completions"
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}]}'
Source = tuple[str, bytes | ImageUrl | InputError]
"""An image as it was sent, with the name of its parameter."""


@dataclass(frozen=True)
class ChatService:
    """Who answers, in how many seconds, with how many tokens at most."""

    answerer: Answerer
    timeout: float
    max_tokens: int


def chat_router(services: Services, chat: ChatService) -> APIRouter:
    router = APIRouter(tags=["openai"], route_class=OpenAIRoute)
    router.add_api_route(
        PATH,
        ChatEndpoint(services, chat).answer,
        methods=["POST"],
        summary="Answer a conversation with images",
        operation_id=TASK,
        response_model=None,
        responses={
            200: {"model": ChatCompletionResponse, "description": "or, with `stream`, server-sent events"},
            **OPENAI_ERRORS,
            502: {"model": ErrorsResponse},
        },
        openapi_extra=describe_document(ChatRequest),
    )
    return router


class ChatEndpoint:
    """Takes questions and gives answers, whole or as a stream."""

    def __init__(self, services: Services, chat: ChatService) -> None:
        self._services = services
        self._chat = chat

    async def answer(self, request: Request) -> Response:
        return await admitted(request, self._services, path=PATH, task=TASK, answer=self._answer, refuse=openai_error_response)

    async def _answer(self, request: Request, ticket: Ticket) -> Response:
        exchange = Exchange()
        with ExitStack() as held:
            held.callback(exchange.observe)
            try:
                question = await self._question(request, ticket, exchange)
                with cancelled_by_departure(request, ticket):
                    if not question.asked.stream:
                        async with ticket.within_deadline():
                            content = orjson.dumps(await self._chat.answerer.complete(question))
                        return Response(content, media_type="application/json")
                    events = self._chat.answerer.stream(question)
                    async with ticket.within_deadline():
                        first = await anext(events)
            except asyncio.CancelledError:
                exchange.end("cancelled")
                raise
            stream = EventStream(_flow(first, events, question))
            stream.held.push(held.pop_all())
            return stream

    async def _question(self, request: Request, ticket: Ticket, exchange: Exchange) -> Question:
        """What is asked, with the bytes of every image; from here on the answer has the time of a chat."""
        services = self._services
        with ticket.stage("read"):
            body = await read_body(request, ticket, services.admission, services.max_body_bytes)
        with ticket.stage("parse"):
            asked, sources = await asyncio.to_thread(self._parse, body) if len(body) > PARSED_ON_THE_LOOP else self._parse(body)
        with cancelled_by_departure(request, ticket):
            fetched = await fetch_addresses([source for _, source in sources], services, ticket)
        images = []
        for (name, _), content in zip(sources, fetched, strict=True):
            if isinstance(content, InputError):
                raise type(content)(content.detail, field=name) from content
            images.append(SentImage(name, content))
        ticket.allow(self._chat.timeout)
        return Question(asked, tuple(images), ticket, exchange)

    def _parse(self, body: bytes) -> tuple[ChatRequest, list[Source]]:
        asked = read_chat(read_json(body, EXAMPLE), max_images=self._services.max_images, max_tokens=self._chat.max_tokens)
        return asked, [(name, json_image(part.image_url.url)) for name, part in asked.image_parts()]


async def _flow(first: bytes, events: AsyncGenerator[bytes], question: Question) -> AsyncGenerator[bytes]:
    """All events of a stream; what goes wrong when it has begun is its last but one."""
    ticket, exchange = question.ticket, question.exchange
    async with aclosing(events):
        try:
            yield first
            while (event := await _next(events, ticket)) is not None:
                yield event
        except VitrineError as error:
            log_failure(error, ticket.id)
            exchange.end("error")
            yield encode_event(openai_error(error))
            yield DONE
        except (asyncio.CancelledError, GeneratorExit):
            exchange.end("cancelled")
            ticket.departed |= exchange.outcome == "cancelled"
            raise
        except Exception:
            log.exception("request %s failed in the middle of its stream", ticket.id)
            exchange.end("error")
            yield encode_event(openai_error(VitrineError(UNFORESEEN)))
            yield DONE


async def _next(events: AsyncGenerator[bytes], ticket: Ticket) -> bytes | None:
    async with ticket.within_deadline():
        return await anext(events, None)
