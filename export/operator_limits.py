"""The limits of the TensorRT parser that depend on a node's attributes, constants and number of axes; for `export/operators.py`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.operator_table import MAX_K, OPERATORS, QUANTIZED

Problem = tuple[str, str]
"""Severity and what the node does that is not taken: its message after the operator's name."""


@dataclass
class Tensors:
    """What is known of the tensors of a graph, by name: element type, number of axes, and constant values."""

    types: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def learn(self, graph: onnx.GraphProto) -> None:
        for info in (*graph.input, *graph.value_info, *graph.output):
            self.types[info.name] = info.type.tensor_type.elem_type
            if info.type.tensor_type.HasField("shape"):
                self.ranks[info.name] = len(info.type.tensor_type.shape.dim)
        for tensor in graph.initializer:
            self.constants[tensor.name] = tensor
            self.types[tensor.name], self.ranks[tensor.name] = tensor.data_type, len(tensor.dims)
        for node in graph.node:
            value = attribute(node, "value")
            if node.op_type == "Constant" and isinstance(value, TensorProto):
                self.constants[node.output[0]] = value
            for body in bodies(node):
                self.learn(body)

    def rank(self, node: NodeProto, index: int) -> int | None:
        return self.ranks.get(input_name(node, index))

    def constant(self, node: NodeProto, index: int) -> TensorProto | None:
        return self.constants.get(input_name(node, index))


def bodies(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs of If, Loop and Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    value = default if found is None else helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value


def input_name(node: NodeProto, index: int) -> str:
    """The name of an input, empty when it is left out."""
    return node.input[index] if index < len(node.input) else ""


Limit = Callable[[NodeProto, Tensors], Iterator[Problem]]


def _fixed(index: int, what: str) -> Limit:
    """Input `index` must be a constant of the graph, or left out."""

    def check(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
        if input_name(node, index) and tensors.constant(node, index) is None:
            yield "error", f"needs `{what}` as a constant"

    return check


def _must(name: str, *allowed: Any) -> Limit:
    """Attribute `name` must be one of `allowed`, the first of which is its default."""

    def check(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
        value = attribute(node, name, allowed[0])
        if value not in allowed:
            yield "error", f"does not take {name}={value}"

    return check


def _axes(*allowed: int) -> Limit:
    """The data input must have one of these numbers of axes."""

    def check(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
        rank = tensors.rank(node, 0)
        if rank is not None and rank not in allowed:
            yield "error", f"does not take {rank} axes"

    return check


def _one_output(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    if any(node.output[1:]):
        yield "error", "has only its first output"


def _no_dilations(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    if any(dilation != 1 for dilation in attribute(node, "dilations", ())):
        yield "error", "does not take dilations"


def _zero_point(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    """Quantization is symmetric and INT8 or lower; without a zero point ONNX means UINT8 for QuantizeLinear."""
    point = tensors.constant(node, 2)
    if input_name(node, 2) and point is None:
        yield "error", "needs its zero point as a constant"
    elif point is not None and numpy_helper.to_array(point).any():
        yield "error", "needs a zero point of 0"
    if node.op_type == "QuantizeLinear":
        kind = attribute(node, "output_dtype", 0) or (point.data_type if point is not None else TensorProto.UINT8)
        if kind not in QUANTIZED:
            yield "error", f"does not quantize to {TensorProto.DataType.Name(kind)}"


def _small_k(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    k = tensors.constant(node, 1)
    if k is None:
        yield "warning", f"is built only if K turns out constant and below {MAX_K}"
    elif numpy_helper.to_array(k).max() >= MAX_K:
        yield "error", f"needs K below {MAX_K}"


def _not_training(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    flag = tensors.constant(node, 2)
    if input_name(node, 2) and (flag is None or numpy_helper.to_array(flag).any()):
        yield "error", "does not train"


def _cubic(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    """The documentation lists nearest and linear, the parser takes cubic as well."""
    if attribute(node, "mode") == "cubic":
        yield "warning", "takes mode=cubic without documenting it"


_POOL: tuple[Limit, ...] = (_axes(4, 5), _no_dilations)
_REDUCE: tuple[Limit, ...] = (_fixed(1, "axes"),)

LIMITS: dict[str, tuple[Limit, ...]] = {
    "Attention": (_axes(4), _must("softcap", 0.0), _fixed(4, "past_key"), _fixed(5, "past_value"), _one_output),
    "AveragePool": _POOL,
    "BatchNormalization": (_must("training_mode", 0), _one_output),
    "CumSum": (_fixed(1, "axis"),),
    "DeformConv": (_axes(3, 4),),
    "DequantizeLinear": (_zero_point,),
    "Dropout": (_not_training,),
    "GridSample": (_axes(4),),
    "LSTM": (_must("input_forget", 0), _must("layout", 0)),
    "LayerNormalization": (_one_output,),
    "LpNormalization": (_must("p", 2, 1),),
    "LpPool": (_must("p", 2, 1), _no_dilations),
    "MaxPool": (*_POOL, _one_output),
    "OneHot": (_fixed(1, "depth"),),
    "QuantizeLinear": (_zero_point,),
    **dict.fromkeys((name for name in OPERATORS if name.startswith("Reduce")), _REDUCE),
    "Resize": (
        _must("antialias", 0),
        _must("keep_aspect_ratio_policy", "stretch"),
        _must(
            "coordinate_transformation_mode",
            "half_pixel",
            "pytorch_half_pixel",
            "tf_half_pixel_for_nn",
            "asymmetric",
            "align_corners",
        ),
        _cubic,
    ),
    "STFT": (_fixed(1, "frame_step"), _fixed(2, "window")),
    "ScatterND": (_must("reduction", "none"),),
    "Squeeze": (_fixed(1, "axes"),),
    "TopK": (_must("sorted", 1), _small_k),
    "Unsqueeze": (_fixed(1, "axes"),),
}
