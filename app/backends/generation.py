"""Chat models of the embedded engine: one thread owns a `Generator`, admits streams to its slots and steps all of them together.

The event loop hands prompts in and gets events out; a stream that nobody waits for any more loses its slot before the next step.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from app import metrics
from app.errors import CapacityError, InferenceError, InvalidValueError, VitrineError
from app.generate import ENGINES, Event, Generator, PreparedImage, Prompt, PromptError, Sampling, Stream
from app.manifest import Entry, Generation

log = logging.getLogger("vitrine.generation")

CHANNELS = 3


def is_chat(entry: Entry) -> bool:
    return entry.manifest.role in ENGINES


@dataclass(eq=False)
class _Job:
    """One prompt on its way through the thread; `cancelled` is set on the event loop."""

    prompt: Prompt
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event | VitrineError]" = field(default_factory=asyncio.Queue)
    cancelled: bool = False


class GenerationThread:
    """Answers up to `generator.max_streams` prompts side by side; up to `max_waiting` more wait their turn."""

    def __init__(self, generator: Generator, name: str, model: str, *, max_waiting: int) -> None:
        """`name` is the engine's in messages and metrics, `model` the model's."""
        self._generator = generator
        self._name = name
        self._max_jobs = generator.max_streams + max_waiting
        self._wakeup = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._active: dict[Stream, _Job] = {}
        self._jobs = 0
        self._closed = False
        self._depth = metrics.Level(metrics.QUEUE_DEPTH.labels(name))
        self._alive = metrics.Level(metrics.CHAT_STREAMS.labels(model))
        self._thread = threading.Thread(target=self._run, name=f"generate-{name}", daemon=True)
        self._thread.start()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        """The events of one stream; closing it gives its slot back.

        Raises:
            CapacityError: all slots are taken, and so are all places to wait.
            InvalidValueError: the model cannot be given this prompt.
            InferenceError: an engine failed.
        """
        job = self._submit(prompt, sampling)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, VitrineError):
                    raise event
                if event.finish == "error":
                    raise InferenceError(f"{self._name}: {event.error}")
                yield event
                if event.finish is not None:
                    return
        finally:
            self._forget(job)

    def close(self) -> None:
        """End the thread after its present step; blocks until then."""
        with self._wakeup:
            self._closed = True
            self._wakeup.notify()
        self._thread.join()

    def _submit(self, prompt: Prompt, sampling: Sampling) -> _Job:
        job = _Job(prompt, sampling, asyncio.get_running_loop())
        with self._wakeup:
            if self._closed:
                raise InferenceError(f"{self._name} is not loaded any more.")
            if self._jobs >= self._max_jobs:
                slots = self._generator.max_streams
                raise CapacityError(f"{self._name} answers {slots} questions, and {self._jobs - slots} wait; retry later.")
            self._jobs += 1
            self._waiting.append(job)
            self._wakeup.notify()
        return job

    def _forget(self, job: _Job) -> None:
        with self._wakeup:
            self._jobs -= 1
            job.cancelled = True
            with suppress(ValueError):
                self._waiting.remove(job)
            self._wakeup.notify()

    def _run(self) -> None:
        while self._admit():
            try:
                events = self._generator.step()
            except Exception:
                log.exception("%s failed in a step", self._name)
                self._fail_all(f"{self._name} failed.")
                continue
            for event in events:
                job = self._active[event.stream]
                if event.finish is not None:
                    del self._active[event.stream]
                _deliver(job, event)
        self._fail_all(f"{self._name} is not loaded any more.")

    def _admit(self) -> bool:
        """Wait for something to do, drop whom nobody waits for, and let the next ones in; False when the thread is to end."""
        with self._wakeup:
            while True:
                self._drop()
                self._let_in()
                self._depth.set(len(self._waiting))
                self._alive.set(len(self._active))
                if self._closed:
                    return False
                if self._active:
                    return True
                self._wakeup.wait()

    def _drop(self) -> None:
        for stream, job in list(self._active.items()):
            if job.cancelled:
                self._generator.cancel(stream)
                del self._active[stream]

    def _let_in(self) -> None:
        while self._waiting and len(self._active) < self._generator.max_streams:
            job = self._waiting.popleft()
            try:
                stream = self._generator.start(job.prompt, job.sampling)
            except PromptError as error:
                _deliver(job, InvalidValueError(str(error), field="messages"))
                continue
            except Exception:
                log.exception("%s cannot begin an answer", self._name)
                _deliver(job, InferenceError(f"{self._name} cannot begin this answer."))
                continue
            self._active[stream] = job

    def _fail_all(self, reason: str) -> None:
        with self._wakeup:
            jobs = [*self._active.values(), *self._waiting]
            for stream in self._active:
                self._generator.cancel(stream)
            self._active.clear()
            self._waiting.clear()
        for job in jobs:
            _deliver(job, InferenceError(reason))


def _deliver(job: _Job, event: Event | VitrineError) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        job.loop.call_soon_threadsafe(job.events.put_nowait, event)


def open_generation(entry: Entry, *, threads: int, max_streams: int, max_waiting: int) -> GenerationThread:
    """The thread of the chat model whose decoder is `entry`, after a first token of a text and of an image.

    Raises:
        InferenceError: an engine cannot be loaded, or fails.
    """
    manifest = entry.manifest
    assert manifest.generation is not None, "a manifest of a decoder has it"
    try:
        root = entry.path.parent.parent
        generator = Generator.open(root, manifest.model, entry.version, threads=threads, max_streams=max_streams)
    except Exception as error:  # onnxruntime raises classes of its own that share no other base
        raise InferenceError(f"onnxruntime cannot load {entry}: {error}") from error
    _warm_up(generator, manifest.generation, str(entry))
    return GenerationThread(generator, str(entry), manifest.model, max_waiting=max_waiting)


def _warm_up(generator: Generator, generation: Generation, name: str) -> None:
    side = generation.merge_size
    patch = CHANNELS * generation.temporal_patch_size * generation.patch_size**2
    image = PreparedImage(np.zeros((side * side, patch), np.uint8), (1, side, side))
    generator.start(Prompt(np.array([generation.image_token_id, 0], np.int64), (image,)), Sampling(max_tokens=1))
    (event,) = generator.step()
    if event.finish == "error":
        raise InferenceError(f"{name}: {event.error}")
