"""Half precision: what is cast, what stays float32, and that constants are cast once."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.precision import to_half

FLOAT, HALF, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def model(*nodes: onnx.NodeProto, **constants: np.ndarray) -> ir.Model:
    """image uint8 [batch,4] -> probabilities float32 [batch,4]."""
    initialisers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4])
    probabilities = helper.make_tensor_value_info("probabilities", FLOAT, ["batch", 4])
    graph = helper.make_graph(list(nodes), "g", [image], [probabilities], initialisers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def node(kind: str, *names: str, **attributes: object) -> onnx.NodeProto:
    *inputs, output = names
    return helper.make_node(kind, inputs, [output], **attributes)


def network() -> ir.Model:
    gain = np.full(4, 1 / 255, np.float32)
    weight = np.array([[1e6, 0, 0, 0], [0, -np.inf, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 1e-3]], np.float32)
    return model(
        node("Cast", "image", "floats", to=FLOAT),
        node("Mul", "floats", "gain", "normalised"),
        node("MatMul", "normalised", "weight", "one"),
        node("MatMul", "normalised", "weight", "two"),
        node("Add", "one", "two", "logits"),
        node("Softmax", "logits", "probabilities", axis=-1),
        gain=gain,
        weight=weight,
    )


def test_only_the_network_between_its_ends_is_cast() -> None:
    changed = network()
    to_half(changed, ir.DataType.FLOAT16)
    proto = ir.serde.serialize_model(changed)
    onnx.checker.check_model(proto, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}

    assert types == {"gain": FLOAT, "weight_float16": HALF}
    assert [entry.op_type for entry in proto.graph.node] == ["Cast", "Mul", "Cast", "MatMul", "MatMul", "Add", "Cast", "Softmax"]
    assert [helper.get_node_attr_value(entry, "to") for entry in proto.graph.node if entry.op_type == "Cast"] == [
        FLOAT,
        HALF,
        FLOAT,
    ]


def test_finite_values_stay_finite() -> None:
    changed = network()
    to_half(changed, ir.DataType.FLOAT16)
    weight = changed.graph.initializers["weight_float16"].const_value

    assert weight is not None
    np.testing.assert_array_equal(np.diag(weight.numpy()), np.array([65504, -np.inf, 0.5, 1e-3], np.float16))


def test_bfloat16_is_valid_onnx_of_a_newer_opset() -> None:
    changed = network()
    to_half(changed, ir.DataType.BFLOAT16)
    proto = ir.serde.serialize_model(changed)
    onnx.checker.check_model(proto, full_check=True)

    assert Counter(tensor.data_type for tensor in proto.graph.initializer) == {FLOAT: 1, BFLOAT: 1}
    assert proto.opset_import[0].version == 22


@pytest.mark.parametrize("batch", [1, 3])
def test_operators_without_a_half_kernel_and_typed_attributes(batch: int) -> None:
    """ConstantOfShape makes floats of its own, Resize keeps its scales, InstanceNormalization stays float32."""
    zeros = helper.make_tensor("value", FLOAT, [1], [0.25])
    changed = model(
        node("Cast", "image", "floats", to=FLOAT),
        node("Mul", "floats", "gain", "normalised"),
        node("Shape", "normalised", "shape"),
        node("ConstantOfShape", "shape", "filled", value=zeros),
        node("Add", "normalised", "filled", "sum"),
        node("Unsqueeze", "sum", "axis", "deep"),
        node("InstanceNormalization", "deep", "ones", "noughts", "calm"),
        node("Resize", "calm", "", "scales", "wide", mode="nearest"),
        node("Resize", "wide", "", "halves", "narrow", mode="nearest"),
        node("Squeeze", "narrow", "axis", "logits"),
        node("Softmax", "logits", "probabilities", axis=-1),
        gain=np.full(4, 1 / 255, np.float32),
        axis=np.array([1]),
        ones=np.ones(1, np.float32),
        noughts=np.zeros(1, np.float32),
        scales=np.array([1, 1, 2], np.float32),
        halves=np.array([1, 1, 0.5], np.float32),
    )
    image = np.arange(4 * batch, dtype=np.uint8).reshape(batch, 4) * 20
    before = infer(changed, image)
    to_half(changed, ir.DataType.FLOAT16)

    np.testing.assert_allclose(infer(changed, image), before, atol=2e-3)


def infer(changed: ir.Model, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(changed).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: np.ndarray = session.run(None, {"image": image})[0]
    return result
