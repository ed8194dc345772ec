"""The embedded engine: onnxruntime in this process, concurrent calls merged by `app.batch`."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Tensors, check_inputs, join, split, together
from app.backends.generation import GenerationThread, is_chat, open_generation
from app.batch import Batcher, Forward
from app.errors import InferenceError
from app.generate import HOST, Event, Prompt, Sampling
from app.manifest import Entry

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
WARM_UP = 0.1  # seconds that the largest batch may take at a load


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is run: `instances` inferences at a time with `threads` threads each.

    Without `threads` an inference has one thread, and `most_threads` where no other of the engine runs or waits. `max_batch` lowers
    the manifest's. `batch_delay`: seconds that a batch which is not full waits for more calls.
    """

    instances: int = 1
    threads: int | None = None
    most_threads: int = 1
    max_batch: int | None = None
    batch_delay: float = 0.0


@dataclass(frozen=True)
class Loaded:
    batcher: Batcher
    own_threads: Executor | None

    async def close(self) -> None:
        await self.batcher.drain()
        if self.own_threads is not None:
            self.own_threads.shutdown(wait=False)


class OnnxRuntimeBackend:
    """On the CPU inferences run on `pool`, whose threads decode too; without it, and on a GPU, on threads of the engine."""

    name = "onnxruntime"

    def __init__(
        self,
        pool: Executor | None = None,
        options: EngineOptions = EngineOptions(),
        *,
        models: Mapping[str, EngineOptions] | None = None,
        max_queue: int = 256,
        chat_streams: int = 4,
        chat_queue: int = 16,
    ) -> None:
        """`models`: options of single models, in place of `options`. `max_queue`: calls that may wait for one engine.

        `chat_streams`: answers of one chat model that grow side by side, `chat_queue`: questions to it that may wait.
        """
        self.pool = pool
        self.options = options
        self.models = models or {}
        self.max_queue = max_queue
        self.chat_streams = chat_streams
        self.chat_queue = chat_queue
        self._loaded: dict[str, Loaded] = {}
        self._speaking: dict[str, GenerationThread] = {}

    def refuses(self, entry: Entry) -> str | None:
        kind = entry.manifest.engine.kind
        return None if kind == "onnx" else f"the embedded onnxruntime cannot run a {kind} engine; serve it with Triton on its GPU"

    async def start(self) -> None:
        pass

    async def load(self, entry: Entry) -> None:
        key = _key(entry)
        if key in self._loaded or key in self._speaking:
            return
        options = self.models.get(entry.manifest.model, self.options)
        if not is_chat(entry):
            self._loaded[key] = await asyncio.to_thread(self._open, entry, options)
        elif entry.manifest.role == HOST:
            self._speaking[key] = await asyncio.to_thread(self._open_chat, entry, options)

    def check_room(self, entry: Entry) -> None:
        loaded = self._loaded.get(_key(entry))
        if loaded is not None:
            loaded.batcher.check_room()

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        loaded = self._loaded.get(_key(entry))
        if loaded is None:
            raise InferenceError(f"{entry} is not loaded.")
        rows = check_inputs(entry, inputs)
        if rows <= loaded.batcher.max_batch:
            return await loaded.batcher.submit(inputs, ticket)
        pieces = split(inputs, rows, loaded.batcher.max_batch)
        return join(await together(loaded.batcher.submit(piece, ticket) for piece in pieces))

    def generate(self, entry: Entry, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        speaking = self._speaking.get(_key(entry))
        if speaking is None:
            raise InferenceError(f"{entry} is not loaded.")
        return speaking.generate(prompt, sampling)

    async def unload(self, entry: Entry) -> None:
        if (speaking := self._speaking.pop(_key(entry), None)) is not None:
            await asyncio.to_thread(speaking.close)
        loaded = self._loaded.pop(_key(entry), None)
        if loaded is not None:
            await loaded.close()

    async def fault(self) -> str | None:
        return None

    def troubles(self) -> list[str]:
        return []

    async def close(self) -> None:
        for loaded in self._loaded.values():
            await loaded.close()
        self._loaded.clear()
        for speaking in self._speaking.values():
            await asyncio.to_thread(speaking.close)
        self._speaking.clear()

    def _open_chat(self, entry: Entry, options: EngineOptions) -> GenerationThread:
        threads = options.threads or options.most_threads
        return open_generation(entry, threads=threads, max_streams=self.chat_streams, max_waiting=self.chat_queue)

    def _open(self, entry: Entry, options: EngineOptions) -> Loaded:
        session = _session(entry, options.threads or 1)
        on_cpu = session.get_providers()[0] == "CPUExecutionProvider"
        wide = session
        if on_cpu and options.threads is None and options.most_threads > 1:
            wide = _session(entry, options.most_threads)
        max_batch = min(entry.manifest.engine.max_batch, options.max_batch or entry.manifest.engine.max_batch)
        forward = _forward(session, wide, entry)
        _warm_up(forward, entry, max_batch)
        shared = self.pool if on_cpu else None
        threads = shared or ThreadPoolExecutor(options.instances, thread_name_prefix=f"infer-{entry}")
        batcher = Batcher(
            str(entry),
            forward,
            threads,
            max_batch=max_batch,
            workers=options.instances,
            max_queue=self.max_queue,
            delay=options.batch_delay,
        )
        return Loaded(batcher, None if threads is shared else threads)


def _session(entry: Entry, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning thread pool steals the cores that decode the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A pattern is one block for each size of a batch: between blocks of many sizes the arena's free memory falls to pieces.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    providers = [provider for provider in PROVIDERS if provider in ort.get_available_providers()]
    # Blocked layouts are for convolutions in float32; choosing them crashes the process on the transposes of some float16 graphs.
    unwanted = ["NchwcTransformer"] if entry.manifest.precision == "fp16" else []
    try:
        session = ort.InferenceSession(entry.engine_file, options, providers=providers, disabled_optimizers=unwanted)
    except Exception as error:  # onnxruntime raises a class of its own per status, without a common base
        raise InferenceError(f"onnxruntime cannot load {entry}: {_first_line(error)}") from error
    _check_names("inputs", {i.name for i in session.get_inputs()}, {spec.name for spec in entry.manifest.inputs})
    _check_names("outputs", {o.name for o in session.get_outputs()}, {spec.name for spec in entry.manifest.outputs})
    return session


def _key(entry: Entry) -> str:
    """A version number may come again with another build, after a rollback."""
    return f"{entry}/{entry.manifest.build}"


def _forward(session: ort.InferenceSession, wide: ort.InferenceSession, entry: Entry) -> Forward:
    """Run a batch on `session`, or on `wide` when it is alone."""
    names = [spec.name for spec in entry.manifest.outputs]

    def forward(inputs: Mapping[str, NDArray[Any]], alone: bool) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(names, (wide if alone else session).run(names, inputs), strict=True))
        except Exception as error:
            raise InferenceError(f"{entry} failed on this input: {_first_line(error)}") from error

    return forward


def _warm_up(forward: Forward, entry: Entry, max_batch: int) -> None:
    """Let each session compute the largest batch once, so that it takes its memory now and not in the middle of the work.

    Left out where that would take longer than WARM_UP, to judge by one row, and where a second axis is free.
    """
    shapes = {spec.name: (spec.shape[1:], spec.dtype) for spec in entry.manifest.inputs}
    if any(-1 in shape for shape, _ in shapes.values()):
        return

    def run(rows: int, alone: bool) -> None:
        forward({name: np.zeros((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}, alone)

    with suppress(InferenceError):  # zeros need not be an input that it takes; what it takes is the smoke test's matter
        run(1, False)
        started = time.perf_counter()
        run(1, False)
        if max_batch * (time.perf_counter() - started) <= WARM_UP:
            run(max_batch, False)
            run(max_batch, True)


def _check_names(what: str, have: set[str], want: set[str]) -> None:
    if have != want:
        raise InferenceError(f"The engine's {what} are {sorted(have)}, its manifest says {sorted(want)}; publish it again.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
