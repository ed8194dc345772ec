"""`POST /v1/chat/completions` in OpenAI's shape: admit, read, check, ask whoever answers, and pass the answer on as it grows."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from app import metrics
from app.admission import Ticket
from app.api.body import ImageUrl, json_image, read_body, read_json
from app.api.call import Call, asked_timeout, server_timing
from app.api.chat_schemas import ChatCompletionResponse, ChatRequest, read_chat
from app.api.departure import CLIENT_CLOSED_REQUEST, cancelled_by_departure
from app.api.errors import log_failure
from app.api.exchange import Answerer, Exchange, Question, SentImage
from app.api.images import fetch_addresses
from app.api.openai_errors import UNFORESEEN, OpenAIRoute, openai_error, openai_error_response
from app.api.services import Services
from app.api.sse import DONE, EventStream, encode_event
from app.errors import CapacityError, InputError, VitrineError

log = logging.getLogger("vitrine.chat")

PATH, TASK = "/v1/chat/completions", "chat"
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}]}'
PARSED_ON_THE_LOOP = 256 * 1024  # bytes
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
        responses={200: {"model": ChatCompletionResponse, "description": "or, with `stream`, server-sent events"}},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}
        },
    )
    return router


class ChatEndpoint:
    """Takes questions and gives answers, whole or as a stream."""

    def __init__(self, services: Services, chat: ChatService) -> None:
        self._services = services
        self._chat = chat

    async def answer(self, request: Request) -> Response:
        tracing, request_id = self._services.tracing, request.state.request_id
        call = Call(request_id, TASK, None if tracing is None else tracing.begin(PATH, request_id, request.headers))
        exchange = Exchange()
        with ExitStack() as held:
            held.callback(call.observe)
            held.callback(exchange.observe)
            response = await self._admitted(request, call, exchange, held)
            call.status = response.status_code
            return response

    async def _admitted(self, request: Request, call: Call, exchange: Exchange, held: ExitStack) -> Response:
        """The answer or its error. A stream takes what is `held` with it."""
        try:
            ticket = held.enter_context(self._services.admission.admit(call.id, asked_timeout(request.headers)))
            call.admit(ticket)
            question = await self._question(request, ticket, exchange)
            with cancelled_by_departure(request, ticket):
                if not question.asked.stream:
                    async with ticket.within_deadline():
                        content = orjson.dumps(await self._chat.answerer.complete(question))
                    return Response(content, headers=_timing(ticket), media_type="application/json")
                events = self._chat.answerer.stream(question)
                async with ticket.within_deadline():
                    first = await anext(events)
            return EventStream(_flow(first, events, question, call), held.pop_all(), _timing(ticket))
        except VitrineError as error:
            if isinstance(error, CapacityError):
                metrics.count_refusal(error)
            return openai_error_response(error, call.id)
        except asyncio.CancelledError:
            if call.ticket is None or not call.ticket.departed:
                raise
            exchange.end("cancelled")
            return Response(status_code=CLIENT_CLOSED_REQUEST)

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


async def _flow(first: bytes, events: AsyncGenerator[bytes], question: Question, call: Call) -> AsyncGenerator[bytes]:
    """All events of a stream; what goes wrong when it has begun is its last but one."""
    ticket, exchange = question.ticket, question.exchange
    async with aclosing(events):
        try:
            yield first
            while (event := await _next(events, ticket)) is not None:
                yield event
        except VitrineError as error:
            log_failure(error, call.id)
            exchange.end("error")
            yield encode_event(openai_error(error))
            yield DONE
        except (asyncio.CancelledError, GeneratorExit):
            exchange.end("cancelled")
            call.status = CLIENT_CLOSED_REQUEST if exchange.outcome == "cancelled" else call.status
            raise
        except Exception:
            log.exception("request %s failed in the middle of its stream", call.id)
            exchange.end("error")
            yield encode_event(openai_error(VitrineError(UNFORESEEN)))
            yield DONE


async def _next(events: AsyncGenerator[bytes], ticket: Ticket) -> bytes | None:
    async with ticket.within_deadline():
        return await anext(events, None)


def _timing(ticket: Ticket) -> dict[str, str]:
    return {"Server-Timing": server_timing(ticket.stages)}
