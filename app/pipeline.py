"""The way of a request, every stage in its order. Read this first.

    admit -> read -> parse -> decode -> resize -> queue -> infer -> finish -> encode

`app/admission.py` admits, `app/api` reads, parses and encodes; what lies between is here. Decoding and resizing run on the pool of
`app/compute.py` (Pillow releases the interpreter's lock), inference on the backend, and nothing heavy on the event loop. The stage
`queue` is waiting for a thread of the pool, for room in memory and for the engine.

What comes may be a token grid in place of an image: that is not decoded. What answers may be several engines, one after the other.
Where an answer is drawn onto its image, the image is decoded once more for that: nobody holds its pixels while engines work.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from numpy.typing import NDArray
from PIL.Image import Image

from app import metrics
from app.admission import PixelBudget, Ticket
from app.backends.base import Backend, Tensors, join, together
from app.catalog import Catalog
from app.decode import DecodeLimits, ImageInfo, MinimumSize, OpenedImage, decode, open_image
from app.errors import InferenceError, InputError, ModelNotFoundError, VitrineError
from app.formats import label
from app.manifest import Entry
from app.resize import minimum_size, resize
from app.tasks.base import AnyTask

T = TypeVar("T")
Frame = NDArray[Any]
"""uint8 [H,W,3], exactly what the engine takes."""
Source = bytes | NDArray[Any] | InputError
"""One item of a request: an encoded image, a value that is not decoded (a token grid), or why it was refused while parsing."""
Draw = Callable[[Image, Any], bytes]
"""Makes a file of an upright RGB image, which it may write to, and of a result."""
Flow = list[Tensors]
"""What became of one item: its tensors [n,...] as they were prepared, then as each engine gave them."""


@dataclass(frozen=True)
class Item:
    """What became of one item: `result` (the task's), or the error that it alone met. `image` is None where none was decoded.

    `drawn` is the file of the image with the result drawn onto it, where that was asked for.
    """

    image: ImageInfo | None
    result: Any = None
    error: VitrineError | None = None
    drawn: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """One item per source, in the order of the request; `entry` is the first engine that answered."""

    entry: Entry
    items: tuple[Item, ...]


class Pipeline:
    """Runs requests through decode, resize, the backend and the task; the caller does so within the ticket's deadline."""

    def __init__(self, catalog: Catalog, backend: Backend, limits: DecodeLimits, pixels: PixelBudget, pool: Executor) -> None:
        self.catalog = catalog
        self.backend = backend
        self.limits = limits
        self.pixels = pixels
        self.pool = pool

    async def acquire(self, task: AnyTask, model: str | None, options: Any, ticket: Ticket) -> tuple[Entry, ...]:
        """The engines of the task's plan, loaded, all of one version of one model.

        Raises:
            ModelError, BackendError: the model cannot answer.
        """
        version = await self.catalog.acquire(model, task.name, task.role)
        roles = task.plan(options).roles
        ticket.model = version.entries[task.role].manifest.model
        if missing := [role for role in roles if role not in version.entries]:
            raise ModelNotFoundError(f"{ticket.model} has no engine for {missing[0]}, which this request needs.", field="model")
        return tuple([version.entries[role] for role in roles])

    async def run(
        self,
        task: AnyTask,
        entries: Sequence[Entry],
        sources: Sequence[Source],
        options: Any,
        ticket: Ticket,
        *,
        draw: Draw | None = None,
    ) -> Answer:
        """Answer every source with the engines that `acquire` gave; one that was refused already keeps its place.

        `draw`, where it is given, is called for every image that has a result, with all of its pixels.

        Raises:
            InvalidValueError, CapacityError, BackendError: concern the whole request.
            DeadlineError: the ticket's time ran out.
        """
        if sources:
            self.backend.check_room(entries[0])
        if len(sources) == 1:
            prepared = [await self._prepare(task, sources[0], entries[0], options, ticket)]
        else:
            prepared = await together(self._prepare(task, source, entries[0], options, ticket) for source in sources)
        answered = iter(await self._infer(entries, [tensors for tensors, _ in prepared if tensors is not None], ticket))
        steps = [
            partial(_finish, task, None if tensors is None else next(answered), entries[0], item, options)
            for tensors, item in prepared
        ]
        if task.plan(options).heavy:
            items = await together(self.compute("finish", ticket, step) for step in steps)
        else:
            with ticket.stage("finish"):
                items = [step() for step in steps]
        if draw is not None:
            items = await together(self.draw(item, source, draw, ticket) for item, source in zip(items, sources, strict=True))
        return Answer(entries[0], tuple(items))

    async def compute(self, stage: str, ticket: Ticket, work: Callable[[], T]) -> T:
        """Run `work` on the pool as (a part of) `stage`; waiting for a thread is the stage `queue`."""
        handed = time.perf_counter()

        def visit() -> T:
            ticket.wait(time.perf_counter() - handed)
            ticket.check()
            with ticket.stage(stage):
                return work()

        return await asyncio.get_running_loop().run_in_executor(self.pool, visit)

    async def _prepare(
        self, task: AnyTask, source: Source, entry: Entry, options: Any, ticket: Ticket
    ) -> tuple[Tensors | None, Item]:
        if isinstance(source, InputError):
            return None, Item(None, error=source)
        if not isinstance(source, bytes):
            return task.prepare(source, entry, None, options), Item(None)
        try:
            frame, image = await self._decode_and_resize(source, entry, ticket)
        except InputError as error:
            metrics.count_undecodable(error, label(source))
            return None, Item(None, error=error)
        metrics.observe_image(len(source), image.width * image.height)
        return task.prepare(frame, entry, image, options), Item(image)

    async def _decode_and_resize(self, data: bytes, entry: Entry, ticket: Ticket) -> tuple[Frame, ImageInfo]:
        preprocessing = entry.manifest.preprocessing
        smallest = partial(minimum_size, preprocessing=preprocessing) if preprocessing.scaled_decoding else None

        def use(image: Image, info: ImageInfo) -> tuple[Frame, ImageInfo]:
            with ticket.stage("resize"):
                return resize(image, preprocessing, (info.width, info.height)), info

        return await self.with_pixels(data, smallest, ticket, use)

    async def draw(self, item: Item, source: Source, draw: Draw, ticket: Ticket) -> Item:
        """`item` with the file that `draw` makes of its image and its result, where it has both."""
        if item.error is not None or not isinstance(source, bytes):
            return item

        def use(image: Image, info: ImageInfo) -> Item:
            with ticket.stage("encode"):
                return replace(item, drawn=draw(image, item.result))

        try:
            return await self.with_pixels(source, None, ticket, use)
        except InputError as error:  # its pixels, all of them, may be too many
            return Item(item.image, error=error)

    async def with_pixels(
        self, data: bytes, smallest: MinimumSize | None, ticket: Ticket, use: Callable[[Image, ImageInfo], T]
    ) -> T:
        """Decode and use the pixels in one visit to the pool; an image whose pixels do not fit into memory now waits for them here
        and goes there again."""
        loop = asyncio.get_running_loop()
        handed = time.perf_counter()

        def begin() -> T | OpenedImage:
            ticket.wait(time.perf_counter() - handed)
            ticket.check()
            with ticket.stage("decode"):
                opened = open_image(data, self.limits, smallest)
            return finish(opened) if self.pixels.try_take(opened.pixels) else opened

        def finish(opened: OpenedImage) -> T:
            """The full-size pixels live only in here."""
            try:
                with ticket.stage("decode"):
                    image, info = decode(opened)
                return use(image, info)
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

    async def _infer(self, entries: Sequence[Entry], prepared: list[Tensors], ticket: Ticket) -> list[Flow | InferenceError]:
        """Send all items through the engines in one call each. When that fails for several at once, each is tried alone."""
        if not prepared:
            return []
        tensors: Tensors = join(prepared)
        flow = [tensors]
        try:
            for entry in entries:
                if len(flow) > 1:
                    tensors = {spec.name: tensors[spec.name] for spec in entry.manifest.inputs}
                tensors = await self.backend.infer(entry, tensors, ticket)
                flow.append(tensors)
        except InferenceError as error:
            if len(prepared) == 1:
                return [error]
            alone = await together(self._infer(entries, [one], ticket) for one in prepared)
            return [each for flows in alone for each in flows]
        return [flow] if len(prepared) == 1 else _split(flow, prepared)


def _split(flow: Flow, prepared: list[Tensors]) -> list[Flow | InferenceError]:
    """Give every item its own rows."""
    flows: list[Flow | InferenceError] = []
    start = 0
    for tensors in prepared:
        stop = start + len(next(iter(tensors.values())))
        flows.append([{name: array[start:stop] for name, array in step.items()} for step in flow])
        start = stop
    return flows


def _finish(task: AnyTask, flow: Flow | InferenceError | None, entry: Entry, item: Item, options: Any) -> Item:
    if flow is None:
        return item
    if isinstance(flow, InferenceError):
        return Item(item.image, error=flow)
    try:
        return Item(item.image, result=task.finish(flow, entry, item.image, options))
    except InferenceError as error:
        return Item(item.image, error=error)
