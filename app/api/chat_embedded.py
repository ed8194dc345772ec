"""Questions for a chat model of the repository: images and conversation become a prompt, tokens become text as they come."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from app import metrics
from app.api.chat_schemas import ENGINE_DEPENDENT, ChatRequest, TextPart, unsupported
from app.api.exchange import Question, SentImage
from app.api.sse import DONE, encode_event
from app.backends.base import GeneratingBackend, together
from app.backends.generation import HOST
from app.chat_prompt import ChatPrompts, chat_prompts, prepare_image
from app.chat_text import TextStream
from app.errors import InputError, InvalidValueError, ModelUnavailableError
from app.generate import Finish, PreparedImage, Prompt, Sampling
from app.manifest import Entry
from app.pipeline import Pipeline

TASK = "chat"


@dataclass(frozen=True)
class Talk:
    """A question ready for its model. `sizes` are the (width, height) at which it sees the images, in pixels."""

    entry: Entry
    prompts: ChatPrompts
    prompt: Prompt
    sampling: Sampling
    sizes: tuple[tuple[int, int], ...]


class EmbeddedChat:
    """Answers with the chat models of the repository, as far as the backend can let them speak."""

    def __init__(self, pipeline: Pipeline, *, max_tokens: int, max_pixels: int) -> None:
        """`max_tokens` of an answer; `max_pixels` at which a model sees an image, where its own limit is above."""
        self._pipeline = pipeline
        self._max_tokens = max_tokens
        self._max_pixels = max_pixels

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
        version = await self._pipeline.catalog.acquire(asked.model, TASK, HOST)
        entry = version.entries[HOST]
        question.exchange.model = ticket.model = entry.manifest.model
        images = await together(self._look(image, entry, question) for image in question.images)
        metrics.count_images(TASK, ticket.model, len(images), ())

        def read() -> tuple[ChatPrompts, Prompt]:
            prompts = chat_prompts(entry)
            return prompts, prompts.prompt(_messages(asked), images)

        prompts, prompt = await self._pipeline.compute("parse", ticket, read)
        question.exchange.prompt_tokens = len(prompt.input_ids)
        sampling = _sampling(asked, len(prompt.input_ids), prompts.generation.max_length, self._max_tokens)
        patch = prompts.generation.patch_size
        sizes = tuple((image.grid_thw[2] * patch, image.grid_thw[1] * patch) for image in images)
        return Talk(entry, prompts, prompt, sampling, sizes)

    async def _look(self, image: SentImage, entry: Entry, question: Question) -> PreparedImage:
        generation, ticket = entry.manifest.generation, question.ticket
        assert generation is not None, "a manifest of a decoder has it"

        def use(pixels: Any, info: Any) -> tuple[PreparedImage, int]:
            with ticket.stage("resize"):
                return prepare_image(pixels, generation, self._max_pixels), info.width * info.height

        try:
            prepared, size = await self._pipeline.with_pixels(image.content, None, ticket, use)
        except InputError as error:
            metrics.count_images(TASK, ticket.model, 0, [error])
            raise type(error)(error.detail, field=image.field) from error
        metrics.observe_image(len(image.content), size)
        return prepared

    async def _pieces(self, talk: Talk, question: Question) -> AsyncGenerator[tuple[str, Finish | None]]:
        """Pieces of text as they come, "" where a token makes none; the last with how the answer ended."""
        backend = self._pipeline.backend
        if not isinstance(backend, GeneratingBackend):
            raise ModelUnavailableError("Chat models answer on the embedded engine alone; see VITRINE_BACKEND.")
        text = TextStream(talk.prompts.tokenizer, talk.sampling.stop)
        started = time.perf_counter()
        try:
            async with aclosing(backend.generate(talk.entry, talk.prompt, talk.sampling)) as events:
                async for event in events:
                    piece = ""
                    if event.token is not None:
                        question.exchange.token()
                        piece = text.push(event.token)
                    finish = "stop" if text.stopped else event.finish
                    if finish is not None:
                        question.exchange.end(finish)
                        yield piece + text.finish(), finish
                        return
                    yield piece, None
        finally:
            question.ticket.record("infer", time.perf_counter() - started)


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


def _sampling(asked: ChatRequest, prompt: int, most: int, limit: int) -> Sampling:
    """How the answer to a prompt of so many tokens is to be drawn; `most` tokens have room in the model, with the answer.

    Raises:
        InvalidValueError: prompt, or prompt and answer, have more.
    """
    room = most - prompt
    if room < 1:
        raise InvalidValueError(
            f"The conversation has {prompt} tokens with its images; the model has room for {most}.", field="messages"
        )
    if asked.most_tokens is not None and asked.most_tokens > room:
        raise InvalidValueError(
            f"The conversation has {prompt} tokens and {asked.tokens_field} is {asked.most_tokens}; the model has room for {most}.",
            field=asked.tokens_field,
        )
    return Sampling(
        max_tokens=min(room, limit) if asked.most_tokens is None else asked.most_tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        stop=tuple(asked.stop),
    )


def _head(talk: Talk, question: Question, kind: str) -> dict[str, Any]:
    name = talk.entry.manifest.model
    return {"id": f"chatcmpl-{question.ticket.id}", "object": kind, "created": int(time.time()), "model": name}


def _choice(delta: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}


def _usage(question: Question) -> dict[str, int]:
    prompt, completion = question.exchange.prompt_tokens, question.exchange.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _seen(talk: Talk) -> dict[str, Any]:
    return {"images": [{"width": width, "height": height} for width, height in talk.sizes]}
