"""The embedded engine: onnxruntime in this process, concurrent calls merged by `app.batch`."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Tensors, check_inputs, join, split
from app.batch import Batcher
from app.errors import InferenceError
from app.manifest import Entry

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


@dataclass(frozen=True)
class Loaded:
    batcher: Batcher
    executor: ThreadPoolExecutor


class OnnxRuntimeBackend:
    """One session an engine; `instances` inferences run at a time on it, each with `threads` threads."""

    name = "onnxruntime"

    def __init__(self, *, instances: int = 1, threads: int = 1, max_queue: int = 256) -> None:
        self.instances = instances
        self.threads = threads
        self.max_queue = max_queue
        self._loaded: dict[str, Loaded] = {}

    def refuses(self, entry: Entry) -> str | None:
        kind = entry.manifest.engine.kind
        return None if kind == "onnx" else f"the embedded onnxruntime cannot run a {kind} engine; serve it with Triton on its GPU"

    async def start(self) -> None:
        pass

    async def load(self, entry: Entry) -> None:
        key = _key(entry)
        if key in self._loaded:
            return
        session = await asyncio.to_thread(self._open, entry)
        executor = ThreadPoolExecutor(self.instances, thread_name_prefix=f"infer-{entry}")
        batcher = Batcher(
            str(entry),
            lambda inputs: _forward(session, entry, inputs),
            executor,
            max_batch=entry.manifest.engine.max_batch,
            workers=self.instances,
            max_queue=self.max_queue,
        )
        self._loaded[key] = Loaded(batcher, executor)

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        loaded = self._loaded.get(_key(entry))
        if loaded is None:
            raise InferenceError(f"{entry} is not loaded.")
        rows = check_inputs(entry, inputs)
        if rows <= loaded.batcher.max_batch:
            return await loaded.batcher.submit(inputs, ticket)
        pieces = split(inputs, rows, loaded.batcher.max_batch)
        return join(await asyncio.gather(*(loaded.batcher.submit(piece, ticket) for piece in pieces)))

    async def unload(self, entry: Entry) -> None:
        loaded = self._loaded.pop(_key(entry), None)
        if loaded is not None:
            await loaded.batcher.drain()
            loaded.executor.shutdown(wait=False)

    async def fault(self) -> str | None:
        return None

    async def close(self) -> None:
        for loaded in self._loaded.values():
            await loaded.batcher.drain()
            loaded.executor.shutdown(wait=False)
        self._loaded.clear()

    def _open(self, entry: Entry) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # A spinning thread pool steals the cores that decode the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        available = ort.get_available_providers()
        try:
            session = ort.InferenceSession(entry.engine_file, options, providers=[p for p in PROVIDERS if p in available])
        except Exception as error:  # onnxruntime raises a class of its own per status, without a common base
            raise InferenceError(f"onnxruntime cannot load {entry}: {_first_line(error)}") from error
        _check_names("inputs", {i.name for i in session.get_inputs()}, {spec.name for spec in entry.manifest.inputs})
        _check_names("outputs", {o.name for o in session.get_outputs()}, {spec.name for spec in entry.manifest.outputs})
        return session


def _key(entry: Entry) -> str:
    """A version number may come again with another build, after a rollback."""
    return f"{entry}/{entry.manifest.build}"


def _forward(session: ort.InferenceSession, entry: Entry, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    names = [spec.name for spec in entry.manifest.outputs]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise InferenceError(f"{entry} failed on this input: {_first_line(error)}") from error


def _check_names(what: str, have: set[str], want: set[str]) -> None:
    if have != want:
        raise InferenceError(f"The engine's {what} are {sorted(have)}, its manifest says {sorted(want)}; publish it again.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
