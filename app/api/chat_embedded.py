"""Questions for a chat model of the repository, answered in OpenAI's shape as its tokens come."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from app import metrics
from app.api.chat_schemas import ENGINE_DEPENDENT, ChatRequest, TextPart, unsupported
from app.api.exchange import Question, SentImage
from app.api.sse import DONE, encode_event
from app.backends.base import together
from app.chat import TASK, ChatModels, ReadPrompt, SeenImage
from app.errors import InputError, InvalidValueError
from app.generate import Finish, Sampling
from app.manifest import Entry


@dataclass(frozen=True)
class Talk:
    """A question ready for its model."""

    read: ReadPrompt
    sampling: Sampling
    images: tuple[SeenImage, ...]


class EmbeddedChat:
    """Answers with the chat models of the repository."""

    def __init__(self, models: ChatModels, *, max_tokens: int) -> None:
        """`max_tokens` of an answer."""
        self._models = models
        self._max_tokens = max_tokens

    async def complete(self, question: Question) -> dict[str, Any]:
        talk = await self._prepare(question)
        async with aclosing(self._pieces(talk, question)) as pieces:
            told = [piece async for piece, _ in pieces]
        message = {"role": "assistant", "content": "".join(told)}
        return {
            **_head(talk, question, "chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": question.exchange.outcome}],
            "usage": _usage(question),
            "vitrine": _seen(talk),
        }

    async def stream(self, question: Question) -> AsyncGenerator[bytes]:
        """The first event comes with the first token: what fails before is no stream yet."""
        talk = await self._prepare(question)
        head = _head(talk, question, "chat.completion.chunk")
        if question.asked.include_usage:
            head["usage"] = None
        begun = False
        async with aclosing(self._pieces(talk, question)) as pieces:
            async for piece, finish in pieces:
                if not begun:
                    begun = True
                    yield encode_event({**head, **_choice({"role": "assistant", "content": ""}, None), "vitrine": _seen(talk)})
                if piece:
                    yield encode_event({**head, **_choice({"content": piece}, None)})
                if finish is not None:
                    yield encode_event({**head, **_choice({}, finish)})
        if question.asked.include_usage:
            yield encode_event({**head, "choices": [], "usage": _usage(question)})
        yield DONE

    async def _prepare(self, question: Question) -> Talk:
        """Find the model, look at the images, read the conversation.

        Raises:
            InvalidValueError: a parameter that these models do not know, an image of an impossible shape, too long a conversation.
            InputError, ModelError, BackendError: an image, the model or its engines.
        """
        asked, ticket = question.asked, question.ticket
        for name in asked.engine_dependent:
            raise unsupported(name, ENGINE_DEPENDENT[name])
        entry = await self._models.acquire(asked.model, ticket)
        question.exchange.model = ticket.model
        images = await together(self._look(image, entry, question) for image in question.images)
        metrics.count_images(TASK, ticket.model, len(images), ())
        read = await self._models.read(entry, _messages(asked), images, ticket)
        question.exchange.prompt_tokens = read.length
        return Talk(read, _sampling(asked, read, self._max_tokens), tuple(images))

    async def _look(self, image: SentImage, entry: Entry, question: Question) -> SeenImage:
        try:
            return await self._models.look(image.content, entry, question.ticket)
        except InputError as error:
            metrics.count_images(TASK, question.ticket.model, 0, [error])
            raise type(error)(error.detail, field=image.field) from error

    async def _pieces(self, talk: Talk, question: Question) -> AsyncGenerator[tuple[str, Finish | None]]:
        exchange = question.exchange
        async with aclosing(self._models.answer(talk.read, talk.sampling, question.ticket, exchange.token)) as pieces:
            async for piece, finish in pieces:
                if finish is not None:
                    exchange.end(finish)
                yield piece, finish


def _messages(asked: ChatRequest) -> list[Mapping[str, Any]]:
    """As chat templates take them: `developer` is `system`, and an image is its place alone."""
    messages: list[Mapping[str, Any]] = []
    for message in asked.messages:
        role = "system" if message.role == "developer" else message.role
        content: Any = message.content
        if not isinstance(content, str):
            content = [{"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"} for part in content]
        messages.append({"role": role, "content": content})
    return messages


def _sampling(asked: ChatRequest, read: ReadPrompt, limit: int) -> Sampling:
    """How the answer is to be drawn, of `limit` tokens at most where none is asked for.

    Raises:
        InvalidValueError: the model has no room for the conversation, or for that long an answer to it.
    """
    prompt, most = read.length, read.prompts.generation.max_length
    if read.room < 1:
        raise InvalidValueError(
            f"The conversation has {prompt} tokens with its images; the model has room for {most}.", field="messages"
        )
    if asked.most_tokens is not None and asked.most_tokens > read.room:
        raise InvalidValueError(
            f"The conversation has {prompt} tokens and {asked.tokens_field} is {asked.most_tokens}; the model has room for {most}.",
            field=asked.tokens_field,
        )
    return Sampling(
        max_tokens=min(read.room, limit) if asked.most_tokens is None else asked.most_tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        stop=tuple(asked.stop),
    )


def _head(talk: Talk, question: Question, kind: str) -> dict[str, Any]:
    name = talk.read.entry.manifest.model
    return {"id": f"chatcmpl-{question.ticket.id}", "object": kind, "created": int(time.time()), "model": name}


def _choice(delta: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}


def _usage(question: Question) -> dict[str, int]:
    prompt, completion = question.exchange.prompt_tokens, question.exchange.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _seen(talk: Talk) -> dict[str, Any]:
    return {"images": [{"width": image.width, "height": image.height} for image in talk.images]}
