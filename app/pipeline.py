"""The way of a request, every stage in its order. Read this first.

    admit -> read -> parse -> decode -> resize -> queue -> infer -> finish -> encode

`app/admission.py` admits, `app/api` reads, parses and encodes; what lies between is here. Decoding and resizing run on the pool of
`app/compute.py` (Pillow releases the interpreter's lock), inference on the backend, and nothing heavy on the event loop. The stage
`queue` is waiting for a thread of the pool, for room in memory and for the engine.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import metrics
from app.admission import PixelBudget, Ticket
from app.backends.base import Backend, Tensors, together
from app.catalog import Catalog
from app.decode import DecodeLimits, ImageInfo, OpenedImage, decode, open_image
from app.errors import InferenceError, InputError, VitrineError
from app.formats import label
from app.manifest import Entry
from app.resize import minimum_size, resize
from app.tasks.base import AnyTask

Frame = NDArray[Any]
"""uint8 [H,W,3], exactly what the engine takes."""


@dataclass(frozen=True)
class Item:
    """What became of one image: `result` (the task's), or the error that it alone met."""

    image: ImageInfo | None
    result: Any = None
    error: VitrineError | None = None


@dataclass(frozen=True)
class Answer:
    """One item per image, in the order of the request."""

    entry: Entry
    items: tuple[Item, ...]


class Pipeline:
    """Runs requests through decode, resize, the backend and the task."""

    def __init__(self, catalog: Catalog, backend: Backend, limits: DecodeLimits, pixels: PixelBudget, pool: Executor) -> None:
        self.catalog = catalog
        self.backend = backend
        self.limits = limits
        self.pixels = pixels
        self.pool = pool

    async def run(
        self, task: AnyTask, model: str | None, images: Sequence[bytes | InputError], options: Any, ticket: Ticket
    ) -> Answer:
        """Answer every image; one that was already refused while parsing comes as its error and keeps its place.

        Raises:
            ModelError, CapacityError, BackendError: concern the whole request.
            DeadlineError: the ticket's time ran out.
        """
        async with ticket.within_deadline():
            entry = await self.catalog.acquire(model, task.name, task.role)
            ticket.model = entry.manifest.model
            if len(images) == 1:
                prepared = [await self._prepare(images[0], entry, ticket)]
            else:
                prepared = await together(self._prepare(image, entry, ticket) for image in images)
            outputs = await self._infer(entry, [frame for frame, _ in prepared if frame is not None], ticket)
        with ticket.stage("finish"):
            rows = iter(outputs)
            items = [item if frame is None else _finish(task, next(rows), entry, item, options) for frame, item in prepared]
        return Answer(entry, tuple(items))

    async def _prepare(self, image: bytes | InputError, entry: Entry, ticket: Ticket) -> tuple[Frame | None, Item]:
        if isinstance(image, InputError):
            return None, Item(None, error=image)
        try:
            frame, info = await self._decode_and_resize(image, entry, ticket)
        except InputError as error:
            metrics.count_undecodable(error, label(image))
            return None, Item(None, error=error)
        metrics.observe_image(len(image), info.width * info.height)
        return frame, Item(info)

    async def _decode_and_resize(self, data: bytes, entry: Entry, ticket: Ticket) -> tuple[Frame, ImageInfo]:
        """One visit to the pool; an image whose pixels do not fit into memory now waits for them here and goes there again."""
        loop = asyncio.get_running_loop()
        preprocessing = entry.manifest.preprocessing
        handed = time.perf_counter()

        def begin() -> tuple[Frame, ImageInfo] | OpenedImage:
            ticket.wait(time.perf_counter() - handed)
            ticket.check()
            smallest = partial(minimum_size, preprocessing=preprocessing) if preprocessing.scaled_decoding else None
            with ticket.stage("decode"):
                opened = open_image(data, self.limits, smallest)
            return finish(opened) if self.pixels.try_take(opened.pixels) else opened

        def finish(opened: OpenedImage) -> tuple[Frame, ImageInfo]:
            """The full-size pixels live only in here."""
            try:
                with ticket.stage("decode"):
                    image, info = decode(opened)
                with ticket.stage("resize"):
                    return resize(image, preprocessing, (info.width, info.height)), info
            finally:
                self.pixels.give_back(opened.pixels)

        done = await loop.run_in_executor(self.pool, begin)
        if not isinstance(done, OpenedImage):
            return done
        opened, started = done, time.perf_counter()
        await self.pixels.take(opened.pixels)
        ticket.wait(time.perf_counter() - started)
        visit = self.pool.submit(finish, opened)
        try:
            return await asyncio.wrap_future(visit)
        except asyncio.CancelledError:
            if visit.cancel():  # before it began
                self.pixels.give_back(opened.pixels)
            raise

    async def _infer(self, entry: Entry, frames: list[Frame], ticket: Ticket) -> list[Tensors | InferenceError]:
        """One row of outputs per frame. When the engine fails on several at once, each is tried alone."""
        if not frames:
            return []
        images = frames[0][None] if len(frames) == 1 else np.stack(frames)
        try:
            outputs = await self.backend.infer(entry, {"image": images}, ticket)
        except InferenceError as error:
            if len(frames) == 1:
                return [error]
            alone = await together(self._infer(entry, [frame], ticket) for frame in frames)
            return [row for rows in alone for row in rows]
        return [{name: array[row] for name, array in outputs.items()} for row in range(len(frames))]


def _finish(task: AnyTask, row: Tensors | InferenceError, entry: Entry, item: Item, options: Any) -> Item:
    if isinstance(row, InferenceError):
        return Item(item.image, error=row)
    try:
        result = task.finish(row, entry, item.image, options)  # type: ignore[arg-type]
    except InferenceError as error:
        return Item(item.image, error=error)
    return Item(item.image, result=result)
