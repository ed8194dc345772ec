"""A user's own ONNX model as a network: normalised RGB images in, its outputs out, whatever its layout and colour order."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.spec import Activation, ExportError, OnnxInterface

_FLOATS: dict[int, type[np.float32] | type[np.float16]] = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}

_LEAST = float(np.finfo(np.float32).smallest_subnormal)
_MOST = 1 - 1e-7


class OnnxNetwork:
    """`model` with the one input that `interface` means, and the `outputs` of these names, or the one that `interface` means.

    Raises:
        ExportError: several inputs or outputs and none named; the input is no image of floats.
    """

    def __init__(self, model: onnx.ModelProto, interface: OnnxInterface, outputs: Sequence[str] = ()) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        self.model = model
        self.interface = interface
        self.input = _choose(inputs, interface.input_name, "input")
        found = list(model.graph.output)
        self.outputs = [_choose(found, name, "output") for name in outputs or (interface.output_name,)]
        self.dtype = self.input.type.tensor_type.elem_type
        self._check_input()

    @property
    def output(self) -> onnx.ValueInfoProto:
        """The first or only one."""
        return self.outputs[0]

    @property
    def sizes(self) -> list[int | None]:
        """The input's axes; None where they are free."""
        dims = self.input.type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width where the model fixes them."""
        height, width = self.sizes[2:4] if self.interface.layout == "NCHW" else self.sizes[1:3]
        return (height, width) if height and width else None

    @property
    def fixed_batch(self) -> int | None:
        return self.sizes[0]

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised RGB float32 [B,3,H,W] -> the model's first or only output as float32.

        Raises:
            ExportError: onnxruntime cannot run the model.
        """
        return self.run_all(images)[0]

    def run_all(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Normalised RGB float32 [B,3,H,W] -> the model's own outputs as float32.

        Raises:
            ExportError: onnxruntime cannot run the model.
        """
        if self.interface.colour == "BGR":
            images = images[:, ::-1]
        if self.interface.layout == "NHWC":
            images = images.transpose(0, 2, 3, 1)
        inputs = np.ascontiguousarray(images, dtype=_FLOATS[self.dtype])
        step = self.fixed_batch or len(inputs)
        try:
            parts = [self._run(inputs[start : start + step]) for start in range(0, len(inputs), step)]
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the model: {error}") from error
        return [np.concatenate(rows).astype(np.float32) for rows in zip(*parts, strict=True)]

    def logits(self, images: Tensor, activation: Activation) -> Tensor:
        """Normalised RGB float32 [B,3,H,W] -> logits float32 [B,C]; what `activation` makes the model's probabilities of."""
        output = torch.from_numpy(self.run(images.numpy()))
        if self.interface.output != "probabilities":
            return output
        # float32 holds far smaller probabilities than distances from one, so that the two ends are not alike.
        probabilities = output.double().clamp(_LEAST, _MOST)
        return (probabilities.log() if activation == "softmax" else probabilities.logit()).float()

    def _run(self, inputs: NDArray[Any]) -> list[NDArray[Any]]:
        return cast("list[NDArray[Any]]", self._session.run([value.name for value in self.outputs], {self.input.name: inputs}))

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _check_input(self) -> None:
        sizes = self.sizes
        channels = sizes[1 if self.interface.layout == "NCHW" else -1] if len(sizes) == 4 else 0
        if channels not in (3, None):
            raise ExportError(f"The model's input {self.input.name} is {sizes}, not {self.interface.layout} with 3 channels.")
        if self.dtype not in _FLOATS:
            raise ExportError(f"The model's input {self.input.name} is not a float tensor, so it is no normalised image.")


def count_weights(model: onnx.ModelProto) -> int:
    """The float values that the model holds."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    return sum(torch.Size(tensor.dims).numel() for tensor in model.graph.initializer if tensor.data_type in floats)


def _choose(values: list[onnx.ValueInfoProto], name: str | None, kind: str) -> onnx.ValueInfoProto:
    named = [value for value in values if name in (None, value.name)]
    if len(named) == 1:
        return named[0]
    names = ", ".join(value.name for value in values)
    problem = f"has several {kind}s; name one of them" if name is None else f"has no {kind} {name!r}; there are"
    raise ExportError(f"The model {problem} (--{kind}-name): {names}.")
