"""Grounding with a chat model: it is asked for the box of each phrase in words and answers in JSON, in pixels of what it saw."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.admission import Ticket
from app.catalog import Catalog
from app.chat import ChatModels, SeenImage
from app.errors import InferenceError, InputError, InvalidValueError
from app.generate import HOST, Sampling
from app.manifest import Entry
from app.masks import Box
from app.pipeline import Answer, Draw, Item, Pipeline, Source
from app.tasks.base import AnyTask
from app.tasks.detect import as_box, clip
from app.tasks.ground import GroundedPhrase, GroundOptions, GroundResult

TASK = "ground"
QUESTION = "Locate {phrase}, output its bbox coordinates using JSON format."
"""As Qwen2.5-VL was taught to ground (its cookbook on spatial understanding)."""
MOST_TOKENS = 128
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(r'"bbox_2d"\s*:\s*\[' + ",".join([NUMBER] * 4) + r"\]")


class ChatGrounding:
    """Stands where the pipeline stands for models that ground by engines of their own, with the same calls."""

    def __init__(self, models: ChatModels, pipeline: Pipeline, catalog: Catalog, default: str) -> None:
        """`default` is the model that grounds when none is named."""
        self._models = models
        self._pipeline = pipeline
        self._catalog = catalog
        self._default = default

    def takes(self, task: AnyTask, name: str | None) -> bool:
        """Whether the request is for a chat model."""
        return task.name == TASK and self._is_chat(name or self._default)

    def role(self, task: str, role: str) -> str:
        """The role that the default model of `task` answers with: `role`, or that of a chat model where one is to ground."""
        return HOST if task == TASK and self._is_chat(self._default) else role

    async def acquire(self, task: AnyTask, model: str | None, options: Any, ticket: Ticket) -> tuple[Entry, ...]:
        """The model's decoder, which stands for all of it.

        Raises:
            ModelError, BackendError: the model cannot answer.
        """
        return (await self._models.acquire(model or self._default, ticket),)

    async def run(
        self,
        task: AnyTask,
        entries: Sequence[Entry],
        sources: Sequence[Source],
        options: GroundOptions,
        ticket: Ticket,
        *,
        draw: Draw | None = None,
    ) -> Answer:
        """One question after the other: the model would not be faster with several at once.

        Raises:
            InvalidValueError: a phrase that the model cannot be asked for.
            CapacityError, DeadlineError: concern the whole request.
        """
        items = [await self._item(source, entries[0], options, ticket) for source in sources]
        if draw is not None:
            items = [await self._pipeline.draw(item, source, draw, ticket) for item, source in zip(items, sources, strict=True)]
        return Answer(entries[0], tuple(items))

    def _is_chat(self, name: str) -> bool:
        model = self._catalog.models.get(name.partition("@")[0])
        return model is not None and model.answers(HOST)

    async def _item(self, source: Source, entry: Entry, options: GroundOptions, ticket: Ticket) -> Item:
        if isinstance(source, InputError):
            return Item(None, error=source)
        assert isinstance(source, bytes), "grounding takes images"
        try:
            seen = await self._models.look(source, entry, ticket)
        except InputError as error:
            return Item(None, error=error)
        try:
            found = [await self._ground(phrase, seen, entry, ticket) for phrase in options.phrases]
        except InferenceError as error:
            return Item(seen.original, error=error)
        return Item(seen.original, result=GroundResult(tuple(found)))

    async def _ground(self, phrase: str, seen: SeenImage, entry: Entry, ticket: Ticket) -> GroundedPhrase:
        if not phrase.strip():
            raise InvalidValueError("The phrase is empty; say in words what to look for.", field="phrase")
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(phrase=phrase)}]
        try:
            read = await self._models.read(entry, [{"role": "user", "content": content}], [seen], ticket)
        except InvalidValueError as error:
            raise InvalidValueError(error.detail, field="phrase") from error
        if read.room < 1:
            raise InvalidValueError(f"The phrase and the image make {read.length} tokens, too many for the model.", field="phrase")
        sampling = Sampling(max_tokens=min(read.room, MOST_TOKENS))
        text = "".join([piece async for piece, _ in self._models.answer(read, sampling, ticket, _unheard)])
        return GroundedPhrase(phrase, read_box(text, seen), None, truncated=False)


def read_box(text: str, seen: SeenImage) -> Box | None:
    """The first `"bbox_2d": [left, top, right, bottom]` of an answer in pixels of the original, cut off at its edges.

    None where the answer names none, or one whose corners are the wrong way round.
    """
    found = BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    if right < left or bottom < top:
        return None
    across, down = seen.original.width / seen.width, seen.original.height / seen.height
    box = np.array([[left * across, top * down, right * across, bottom * down]])
    return as_box(clip(box, seen.original)[0])


def _unheard() -> None:
    """Tokens of grounding are not counted: `vitrine_request_seconds` tells of it."""
