"""Questions for a model server behind this one: images are checked here and sent on upright, the answer passes through."""

import base64
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, get_args

import orjson

from app import metrics
from app.api.errors import REQUEST_ID_HEADER
from app.api.exchange import Exchange, Question, SentImage
from app.api.sse import DONE
from app.backends.base import together
from app.chat import TASK
from app.errors import InputError, ModelNotChosenError, ModelNotFoundError, UpstreamError
from app.formats import label
from app.pipeline import Pipeline
from app.upright import UprightFile, upright_file
from app.upstream import Upstream

ANY_MODEL = "upstream"  # in the metrics, where the models are not known


class UpstreamChat:
    """Answers with what `upstream` answers. `models` are the names that clients may ask for; none known: it decides."""

    def __init__(self, upstream: Upstream, pipeline: Pipeline, models: Sequence[str]) -> None:
        self._upstream = upstream
        self._pipeline = pipeline
        self._models = models

    async def complete(self, question: Question) -> dict[str, Any]:
        files, body = await self._forwarded(question)
        with question.ticket.stage("infer"):
            answer = await self._upstream.complete(body, _headers(question))
        exchange = question.exchange
        _count(answer, exchange)
        exchange.end(_outcome(answer) or "other")
        return {**answer, "vitrine": {"images": [{"width": file.width, "height": file.height} for file in files]}}

    async def stream(self, question: Question) -> AsyncGenerator[bytes]:
        _, body = await self._forwarded(question)
        exchange = question.exchange
        outcome: metrics.ChatOutcome | None = None
        done = False
        async with aclosing(self._upstream.events(body, _headers(question))) as events:
            async for event in events:
                document = event.document
                if document is not None:
                    if _says_something(document):
                        exchange.token()
                    _count(document, exchange)
                    outcome = _outcome(document) or outcome
                done = event.done
                if done and outcome is not None:
                    exchange.end(outcome)
                yield event.content
        if outcome is None:
            raise UpstreamError("The model server broke off its answer.")
        exchange.end(outcome)
        if not done:
            yield DONE

    async def _forwarded(self, question: Question) -> tuple[list[UprightFile], bytes]:
        """The images as they are sent on, and the body with them."""
        model = self._model(question.asked.model)
        question.exchange.model = question.ticket.model = model if self._models else ANY_MODEL
        files = await together(self._upright(image, question) for image in question.images)
        metrics.count_images(TASK, question.ticket.model, len(files), ())

        def write() -> bytes:
            document = question.asked.model_dump(exclude_unset=True) | {"model": model}
            urls = iter(f"data:{file.media_type};base64,{base64.b64encode(file.content).decode()}" for file in files)
            for message in document["messages"]:
                for part in message["content"] if isinstance(message["content"], list) else ():
                    if part["type"] == "image_url":
                        part["image_url"]["url"] = next(urls)
            return orjson.dumps(document)

        return files, await self._pipeline.compute("encode", question.ticket, write)

    async def _upright(self, image: SentImage, question: Question) -> UprightFile:
        try:
            file = await self._pipeline.with_pixels(
                image.content, None, question.ticket, lambda pixels, info: upright_file(image.content, pixels, info)
            )
        except InputError as error:
            metrics.count_undecodable(error, label(image.content))
            metrics.count_images(TASK, question.ticket.model, 0, [error])
            raise type(error)(error.detail, field=image.field) from error
        metrics.observe_image(len(image.content), file.width * file.height)
        return file

    def _model(self, name: str | None) -> str:
        known = ", ".join(self._models)
        if name is None:
            if len(self._models) == 1:
                return self._models[0]
            raise ModelNotChosenError(f"Name a model{f'; these answer chat: {known}' if known else ''}.", field="model")
        if self._models and name not in self._models:
            raise ModelNotFoundError(f"There is no model {name!r}. Models for chat: {known}.", field="model")
        return name


def _headers(question: Question) -> dict[str, str]:
    """Nothing of what the client sent goes on but the id of its request and its trace."""
    return {REQUEST_ID_HEADER: question.ticket.id, **(question.ticket.context or {})}


def _choices(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    choices = document.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _says_something(document: Mapping[str, Any]) -> bool:
    """Whether a chunk has a piece of the answer in it, of its text or of its reasoning."""
    deltas = [choice.get("delta") for choice in _choices(document)]
    return any(value for delta in deltas if isinstance(delta, dict) for name, value in delta.items() if name != "role")


def _outcome(document: Mapping[str, Any]) -> metrics.ChatOutcome | None:
    reasons = [choice.get("finish_reason") for choice in _choices(document)]
    reason = next((reason for reason in reasons if reason), None)
    if reason is None:
        return None
    return reason if reason in get_args(metrics.ChatOutcome) else "other"


def _count(document: Mapping[str, Any], exchange: Exchange) -> None:
    usage = document.get("usage")
    if isinstance(usage, dict):
        prompt, completion = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
        if isinstance(prompt, int) and isinstance(completion, int):
            exchange.usage(prompt, completion)
