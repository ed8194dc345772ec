"""A staged engine opened for verification, through the backend that serves it where it is an ONNX file."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.onnxruntime import EngineOptions, OnnxRuntimeBackend
from app.errors import BackendError
from app.manifest import Entry
from export.plan import Plan
from export.spec import ExportError

Infer = Callable[[NDArray[Any]], NDArray[Any]]
"""An engine's one input [B,...] -> its one output [B,...], as its manifest has them."""


@contextmanager
def open_engine(entry: Entry) -> Iterator[Infer]:
    """Load the engine; what it raises while it is open becomes an ExportError.

    Raises:
        MissingToolError: a TensorRT plan where there is no TensorRT or no GPU.
        ExportError: the engine does not load or does not run.
    """
    (source,), (target,) = entry.manifest.inputs, entry.manifest.outputs
    if entry.manifest.engine.kind == "tensorrt":
        yield Plan(entry.engine_file, source, target)
        return
    backend = OnnxRuntimeBackend(options=EngineOptions(threads=os.cpu_count() or 1))
    try:
        with asyncio.Runner() as loop:
            loop.run(backend.load(entry))
            try:
                yield lambda rows: loop.run(backend.infer(entry, {source.name: rows}, Ticket()))[target.name]
            finally:
                loop.run(backend.close())
    except BackendError as error:
        raise ExportError(f"The engine does not run in onnxruntime here: {error.detail}") from error
