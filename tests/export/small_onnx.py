"""ONNX classifiers as users bring them: any layout, colour order, opset, batch and output."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES, SIZE = 5, 16


def make_classifier(
    layout: str = "NCHW",
    batch: int | str = "batch",
    size: int | str = SIZE,
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    output: str = "logits",
    reshape: bool = False,
    activation: str = "Softmax",
    bias: float = 0,
) -> onnx.ModelProto:
    """A convolution with weights that differ by colour and place, global mean, Gemm; its names are those of torch.onnx."""
    random = np.random.default_rng(0)
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    weights = {
        "conv": random.standard_normal((8, 3, 5, 5)) / 8,
        "head": random.standard_normal((CLASSES, 8)) * 4,
        "bias": random.standard_normal(CLASSES) + bias,
    }
    initialisers = [numpy_helper.from_array(value.astype(numpy_type), name) for name, value in weights.items()]
    nodes = [helper.make_node("Transpose", ["input"], ["planar"], perm=[0, 3, 1, 2])] if layout == "NHWC" else []
    nodes += [
        helper.make_node("Conv", ["planar" if layout == "NHWC" else "input", "conv"], ["features"], strides=[2, 2]),
        helper.make_node("Relu", ["features"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
    ]
    if reshape:
        initialisers.append(numpy_helper.from_array(np.array([1, -1]), "flat_shape"))
        nodes.append(helper.make_node("Reshape", ["pooled", "flat_shape"], ["flat"]))
    else:
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "head", "bias"], ["logits"], transB=1))
    if output == "probabilities":
        nodes.append(helper.make_node(activation, ["logits"], ["probabilities"]))
    shape: list[Any] = [batch, 3, size, size] if layout == "NCHW" else [batch, size, size, 3]
    graph = helper.make_graph(
        nodes,
        "their_graph",
        [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info(output, dtype, [batch, CLASSES])],
        initialisers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
