"""A staged engine opened for verification, through the backend that serves it where it is an ONNX file."""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Tensors
from app.backends.onnxruntime import EngineOptions, OnnxRuntimeBackend
from app.errors import BackendError
from app.manifest import Entry
from export.plan import Plan
from export.spec import ExportError

Infer = Callable[[NDArray[Any]], NDArray[Any]]
"""An engine's one input [B,...] -> its one output [B,...], as its manifest has them."""

Run = Callable[[Tensors], Mapping[str, NDArray[Any]]]
"""An engine's inputs by name, [B,...] each -> its outputs by name, [B,...] each."""


@contextmanager
def open_engine(entry: Entry) -> Iterator[Infer]:
    """`open_tensors` for an engine that has one input and one output."""
    (source,), (target,) = entry.manifest.inputs, entry.manifest.outputs
    with open_tensors(entry) as run:
        yield lambda rows: run({source.name: rows})[target.name]


@contextmanager
def open_tensors(entry: Entry) -> Iterator[Run]:
    """Load the engine; what it raises while it is open becomes an ExportError.

    Raises:
        MissingToolError: a TensorRT plan where there is no TensorRT or no GPU.
        ExportError: the engine does not load or does not run.
    """
    if entry.manifest.engine.kind == "tensorrt":
        yield Plan(entry.engine_file, entry.manifest.outputs)
        return
    backend = OnnxRuntimeBackend(options=EngineOptions(threads=os.cpu_count() or 1))
    try:
        with asyncio.Runner() as loop:
            loop.run(backend.load(entry))
            try:
                yield lambda inputs: loop.run(backend.infer(entry, inputs, Ticket()))
            finally:
                loop.run(backend.close())
    except BackendError as error:
        raise ExportError(f"The engine does not run in onnxruntime here: {error.detail}") from error
