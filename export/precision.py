"""A float32 graph in half precision: uint8 in and float32 out stay, and so do normalisation and the final activation."""

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.version_converter import convert_version

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
_FLOAT32_OPS = {
    "InstanceNormalization",
    "Range",
    "CumSum",
    "ReduceL2",
    "ReduceSumSquare",
}  # sums over many values, or no half kernel
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895e38}
_BFLOAT16_OPSET = 22  # the first in which convolutions take it
_HEAD_OPS = {"Cast", "Transpose", "Mul", "Add", "Gather"}
_TAIL_OPS = {"Softmax", "Sigmoid", "Cast", "Identity"}
_PIXEL_OPS = {"Cast", "Transpose", "Clip", "Round", "Add", "Mul"}
_FLOAT32_INPUTS = {"Resize": (1, 2)}  # region and scales


def to_half(model: ir.Model, half: ir.DataType, before_tail: ir.Value | None = None) -> None:
    """Turn the float32 values between normalisation and the final activation into `half`, in place.

    What is computed of `before_tail` stays as it is. Finite values beyond the range of float16 become its largest. Types must have
    been inferred. A bfloat16 graph is for TensorRT alone: it needs a newer opset than the onnxruntime of current Triton images has.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    nodes = list(model.graph)
    kept = {*_head(model.graph), *_tail(model.graph), *_behind(before_tail), *(n for n in nodes if n.op_type in _FLOAT32_OPS)}
    floats = {value for node in nodes for value in (*node.inputs, *node.outputs) if value and value.dtype == ir.DataType.FLOAT}
    for node in nodes:
        target = ir.DataType.FLOAT if node in kept else half
        if node not in kept:
            _retarget(node, half)
        for index, value in enumerate(node.inputs):
            fixed = index in _FLOAT32_INPUTS.get(node.op_type, ())
            if value is not None and value in floats and not fixed:
                node.replace_input_with(index, _as(value, target, node))
        for output in node.outputs:
            if output in floats:
                output.dtype = target
    RemoveUnusedNodesPass()(model)
    if half == ir.DataType.BFLOAT16:
        convert_version(model, _BFLOAT16_OPSET)


def _head(graph: ir.Graph) -> Iterable[ir.Node]:
    """The nodes that make normalised floats of the pixels."""
    value = graph.inputs[0]
    while True:  # a Shape node beside the chain reads no values
        readers = [node for node in value.consumers() if node.op_type != "Shape"]
        if len(readers) != 1 or readers[0].op_type not in _HEAD_OPS:
            return
        if any(other is not value and other is not None and other.const_value is None for other in readers[0].inputs):
            return
        yield readers[0]
        value = readers[0].outputs[0]


def _behind(value: ir.Value | None) -> Iterable[ir.Node]:
    """Every node that computes with `value`, directly or not."""
    found: dict[ir.Node, None] = {}
    reached = [] if value is None else [value]
    while reached:
        readers = [node for node in reached.pop().consumers() if node not in found]
        found |= dict.fromkeys(readers)
        reached += [output for node in readers for output in node.outputs]
    return found


def _tail(graph: ir.Graph) -> Iterable[ir.Node]:
    """The nodes that make probabilities of the logits, or pixels of the decoder's output."""
    allowed = _PIXEL_OPS if graph.outputs[0].dtype == ir.DataType.UINT8 else _TAIL_OPS
    node = graph.outputs[0].producer()
    while node is not None and node.op_type in allowed:
        yield node
        value = node.inputs[0]
        node = value.producer() if value is not None else None


def _retarget(node: ir.Node, half: ir.DataType) -> None:
    """Attributes that name a type or hold a float tensor."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        value = node.attributes["value"].as_tensor()
        if value.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_cast(value.numpy(), half)))


def _as(value: ir.Value, target: ir.DataType, before: ir.Node) -> ir.Value:
    """`value` in the wanted type: itself, a converted constant, or a Cast shared by all who need it."""
    if value.dtype == target:
        return value
    graph = before.graph
    if graph is None:
        raise ValueError("the node lies in no graph")
    name = f"{value.name}_{target.name.lower()}"
    if value.const_value is not None:
        if name not in graph.initializers:
            tensor = ir.tensor(_cast(value.const_value.numpy(), target), name=name)
            graph.register_initializer(ir.Value(name=name, shape=value.shape, type=ir.TensorType(target), const_value=tensor))
        return graph.initializers[name]
    known = next((node.outputs[0] for node in value.consumers() if node.outputs[0].name == name), None)
    if known is not None:
        return known
    cast = ir.node("Cast", [value], attributes={"to": int(target)}, name=f"cast_{name}")
    output = cast.outputs[0]
    output.name, output.dtype, output.shape = name, target, value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(before, cast)
    else:
        graph.insert_after(producer, cast)
    return output


def _cast(array: NDArray[Any], target: ir.DataType) -> NDArray[Any]:
    limit = _LARGEST[target]
    finite = np.isfinite(array)
    return np.where(finite, np.clip(array, -limit, limit, where=finite, out=array.copy()), array).astype(_NUMPY[target])
