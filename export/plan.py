"""TensorRT on this machine: asking for the library, and running a plan for its verification."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    """A plan loaded on the GPU; called with the tensor `source` [B,...] it gives the tensor `target` [B,...]."""

    def __init__(self, path: Path, source: TensorSpec, target: TensorSpec) -> None:
        """Load `path`.

        Raises:
            MissingToolError: see `require_tensorrt`.
            ExportError: the plan is of another TensorRT or another GPU.
        """
        trt = require_tensorrt()
        self._source = source
        self._target = target
        self._log = make_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ExportError(f"TensorRT does not load the plan: {'; '.join(self._log.lines)}")
        self._context = self._engine.create_execution_context()

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        given = torch.from_numpy(np.ascontiguousarray(rows)).cuda()
        if not self._context.set_input_shape(self._source.name, tuple(given.shape)):
            raise ExportError(f"The plan does not take {len(rows)} rows at once.")
        shape = tuple(self._context.get_tensor_shape(self._target.name))
        answer = torch.empty(shape, dtype=getattr(torch, self._target.dtype), device=given.device)
        self._context.set_tensor_address(self._source.name, given.data_ptr())
        self._context.set_tensor_address(self._target.name, answer.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(f"TensorRT failed to run the plan: {'; '.join(self._log.lines)}")
        result: NDArray[Any] = answer.cpu().numpy()
        return result
