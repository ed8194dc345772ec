"""The work of an engine: multiply-adds for one image, counted over the ONNX graph."""

from collections.abc import Sequence
from math import prod

import onnx
from onnx import helper, shape_inference

Shape = tuple[int, ...]


def count_macs(model: onnx.ModelProto) -> int | None:
    """Multiply-adds of all convolutions and matrix products for a batch of one; None when a shape stays unknown.

    1 MAC is 1 multiply-add, half of what `torch.utils.flop_counter` counts. Element-wise work is left out, as there.
    """
    shapes = _shapes(model)
    total = 0
    for node in model.graph.node:
        if node.op_type in _COUNTERS:
            inputs = [shapes.get(name) for name in node.input]
            output = shapes.get(node.output[0])
            if output is None or inputs[0] is None or inputs[1] is None:
                return None
            total += _COUNTERS[node.op_type](node, (inputs[0], inputs[1]), output)
    return total


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """The shape of every tensor when the batch is one; those that inference cannot find are left out."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]
    for value in single.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(single, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _convolution(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return prod(output) * prod(inputs[1][1:])


def _transposed_convolution(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return prod(inputs[0]) * prod(inputs[1][1:])


def _product(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return prod(output) * inputs[0][-1]


def _gemm(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return prod(output) * inputs[0][0 if transposed else 1]


def _einsum(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    terms = helper.get_node_attr_value(node, "equation").decode().replace(" ", "").partition("->")[0].split(",")
    sizes = {index: size for term, shape in zip(terms, inputs, strict=True) for index, size in zip(term, shape, strict=True)}
    return prod(sizes.values())


_COUNTERS = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product,
    "Gemm": _gemm,
    "Einsum": _einsum,
}
