"""TensorRT on this machine: asking for the library, and running a plan for its verification."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.manifest import TensorSpec
from export.spec import ExportError, MissingToolError


def require_tensorrt() -> Any:
    """The `tensorrt` module; asked for before any long work.

    Raises:
        MissingToolError: it is not installed, or there is no NVIDIA GPU to build for.
    """
    try:
        tensorrt = import_module("tensorrt")
    except ImportError as error:
        raise MissingToolError(
            "TensorRT is not installed here: run this export in the `export` image on a machine with an NVIDIA GPU, "
            "or leave --engine tensorrt out."
        ) from error
    if not torch.cuda.is_available():
        raise MissingToolError("TensorRT builds for the GPU it finds, and there is no NVIDIA GPU here.")
    return tensorrt


def make_log(trt: Any) -> Any:
    """A logger of TensorRT that keeps warnings and errors in `lines` instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.lines.append(f"{severity.name.lower()}: {msg}")

    return Log()


class Plan:
    """A plan loaded on the GPU; called with its inputs by name, [B,...] each, it gives its `outputs` by name."""

    def __init__(self, path: Path, outputs: Sequence[TensorSpec]) -> None:
        """Load `path`.

        Raises:
            MissingToolError: see `require_tensorrt`.
            ExportError: the plan is of another TensorRT or another GPU.
        """
        trt = require_tensorrt()
        self._outputs = outputs
        self._log = make_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ExportError(f"TensorRT does not load the plan: {'; '.join(self._log.lines)}")
        self._context = self._engine.create_execution_context()

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        given = {name: torch.from_numpy(np.ascontiguousarray(rows)).cuda() for name, rows in inputs.items()}
        for name, rows in given.items():
            if not self._context.set_input_shape(name, tuple(rows.shape)):
                raise ExportError(f"The plan does not take {len(rows)} rows at once.")
        answers = {spec.name: self._empty(spec) for spec in self._outputs}
        for name, tensor in (given | answers).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(f"TensorRT failed to run the plan: {'; '.join(self._log.lines)}")
        return {name: tensor.cpu().numpy() for name, tensor in answers.items()}

    def _empty(self, spec: TensorSpec) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="cuda")
