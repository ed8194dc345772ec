"""Chat models of the repository: what the pipeline is to tasks, this is to conversations.

acquire -> look (decode, resize) -> read (template, tokens) -> answer (token by token)
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from PIL.Image import Image

from app import metrics
from app.admission import Ticket
from app.backends.base import GeneratingBackend
from app.chat_prompt import ChatPrompts, Message, chat_prompts, prepare_image
from app.chat_text import TextStream
from app.decode import ImageInfo
from app.errors import InputError, ModelUnavailableError
from app.formats import label
from app.generate import HOST, Finish, PreparedImage, Prompt, Sampling
from app.manifest import Entry, Generation
from app.pipeline import Pipeline

TASK = "chat"


@dataclass(frozen=True)
class SeenImage:
    """An image as a model sees it, `width` x `height` pixels, and what it was."""

    prepared: PreparedImage
    width: int
    height: int
    original: ImageInfo


@dataclass(frozen=True)
class ReadPrompt:
    """A conversation as a model reads it. `room`: tokens that are left for an answer, less than 1 where it is too long."""

    entry: Entry
    prompts: ChatPrompts
    prompt: Prompt

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids)

    @property
    def room(self) -> int:
        return self.prompts.generation.max_length - self.length


class ChatModels:
    """The chat models of a catalog, as far as its backend can let them speak."""

    def __init__(self, pipeline: Pipeline, *, max_pixels: int) -> None:
        """`max_pixels` at which a model sees an image, where its own limit is above."""
        self._pipeline = pipeline
        self._max_pixels = max_pixels

    async def acquire(self, name: str | None, ticket: Ticket) -> Entry:
        """The decoder of the model, which stands for all of it, loaded.

        Raises:
            ModelError, BackendError: the model cannot answer.
        """
        if not isinstance(self._pipeline.backend, GeneratingBackend):
            raise ModelUnavailableError("Chat models do not answer on this backend; see VITRINE_BACKEND.")
        version = await self._pipeline.catalog.acquire(name, TASK, HOST)
        entry = version.entries[HOST]
        ticket.model = entry.manifest.model
        return entry

    async def look(self, content: bytes, entry: Entry, ticket: Ticket) -> SeenImage:
        """Decode an encoded image and cut it into patches.

        Raises:
            InputError: it does not decode, breaks a limit or has an impossible shape.
        """
        generation = generation_of(entry)

        def use(image: Image, info: ImageInfo) -> SeenImage:
            with ticket.stage("resize"):
                prepared = prepare_image(image, generation, self._max_pixels)
                _, rows, columns = prepared.grid_thw
                return SeenImage(prepared, columns * generation.patch_size, rows * generation.patch_size, info)

        try:
            seen = await self._pipeline.with_pixels(content, None, ticket, use)
        except InputError as error:
            metrics.count_undecodable(error, label(content))
            raise
        metrics.observe_image(len(content), seen.original.width * seen.original.height)
        return seen

    async def read(self, entry: Entry, messages: Sequence[Message], images: Sequence[SeenImage], ticket: Ticket) -> ReadPrompt:
        """The conversation in tokens.

        Raises:
            InvalidValueError: the model cannot read it.
        """

        def work() -> ReadPrompt:
            prompts = chat_prompts(entry)
            return ReadPrompt(entry, prompts, prompts.prompt(messages, [image.prepared for image in images]))

        return await self._pipeline.compute("parse", ticket, work)

    async def answer(
        self, read: ReadPrompt, sampling: Sampling, ticket: Ticket, heard: Callable[[], None]
    ) -> AsyncGenerator[tuple[str, Finish | None]]:
        """Pieces of text as they come, "" where a token makes none; the last with how the answer ended. `heard` for each token.

        Raises:
            CapacityError: no slot is free, and no place to wait for one.
            InferenceError: an engine failed.
        """
        backend = self._pipeline.backend
        assert isinstance(backend, GeneratingBackend), "acquire has seen to it"
        text = TextStream(read.prompts.tokenizer, sampling.stop)
        started = time.perf_counter()
        try:
            async with aclosing(backend.generate(read.entry, read.prompt, sampling)) as events:
                async for event in events:
                    piece = ""
                    if event.token is not None:
                        heard()
                        piece = text.push(event.token)
                    finish = "stop" if text.stopped else event.finish
                    if finish is not None:
                        yield piece + text.finish(), finish
                        return
                    yield piece, None
        finally:
            ticket.record("infer", time.perf_counter() - started)


def generation_of(entry: Entry) -> Generation:
    """What the manifest of a chat model says of it."""
    assert entry.manifest.generation is not None, "reading the manifest has seen to it"
    return entry.manifest.generation
