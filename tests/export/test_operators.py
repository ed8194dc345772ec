from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.manifest import TensorRTReport
from export.operator_table import MAX_K, OPERATORS, PARSER
from export.operators import check_tensorrt
from export.spec import Engine, Reference

FLOAT, UINT8, DOUBLE, BFLOAT16 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.DOUBLE, TensorProto.BFLOAT16
INT64 = TensorProto.INT64


def check(
    *nodes: onnx.NodeProto,
    shape: tuple[int | str, ...] = ("batch", 3, 8, 8),
    dtype: int = FLOAT,
    opset: int = 20,
    others: dict[str, Any] | None = None,
    **constants: Any,
) -> TensorRTReport:
    """The finding on a graph of `nodes` with the input `x`; `others` are further inputs, `constants` its initializers."""
    inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    inputs += [helper.make_tensor_value_info(name, kind, None) for name, kind in (others or {}).items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    domains = {node.domain for node in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return check_tensorrt(helper.make_model(graph, opset_imports=imports, ir_version=10))


def node(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, ["x", *inputs], ["y"], **attributes)


def errors(report: TensorRTReport) -> list[str]:
    return [f"{finding.operator} {finding.message}" for finding in report.findings if finding.severity == "error"]


def warnings(report: TensorRTReport) -> list[str]:
    return [f"{finding.operator} {finding.message}" for finding in report.findings if finding.severity == "warning"]


def test_an_exported_classifier_is_convertible(made: tuple[Engine, Reference]) -> None:
    report = check_tensorrt(onnx.load(made[0].path))
    assert (report.parser, report.convertible, report.findings) == (PARSER, True, ())


@pytest.mark.parametrize("operator", ["Col2Im", "DFT", "Unique", "Det", "Bernoulli", "BitwiseNot", "NoSuchThing"])
def test_an_operator_that_is_not_in_the_table_is_an_error(operator: str) -> None:
    report = check(node(operator))
    assert not report.convertible
    assert errors(report) == [f"{operator} is not supported by the parser"]


def test_the_table_knows_every_operator_by_its_onnx_name() -> None:
    """A misspelt name would be refused for ever. The four that ONNX itself no longer has are the parser's own."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    newer = {"TensorScatter"}  # opset 24, not in every onnx
    assert set(OPERATORS) - known - newer <= {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}


def test_equal_findings_are_counted_once() -> None:
    nodes = [helper.make_node("Det", ["x"], ["a"]), helper.make_node("Det", ["x"], ["b"]), node("Add", "x")]
    (finding,) = check(*nodes).findings
    assert (finding.operator, finding.count, finding.severity) == ("Det", 2, "error")


def test_another_domain_needs_a_plugin() -> None:
    assert errors(check(node("FusedConv", domain="com.microsoft"))) == [
        "FusedConv is of the domain 'com.microsoft' and needs a plugin"
    ]


@pytest.mark.parametrize(("opset", "fine"), [(8, False), (9, True), (24, True), (25, False)])
def test_the_opset_has_limits(opset: int, fine: bool) -> None:
    assert check(node("Relu"), opset=opset).convertible == fine


def test_uint8_is_taken_by_a_cast_alone() -> None:
    assert check(node("Cast", to=FLOAT), dtype=UINT8).convertible
    assert errors(check(node("Transpose", perm=[0, 3, 1, 2]), dtype=UINT8)) == ["Transpose does not take UINT8"]
    assert errors(check(node("Gather", "index", axis=3), dtype=UINT8, index=[0])) == ["Gather does not take UINT8"]


@pytest.mark.parametrize(
    ("operator", "dtype", "complaint"),
    [
        ("Sigmoid", INT64, "Sigmoid does not take INT64"),
        ("Mish", BFLOAT16, "Mish does not take BFLOAT16"),
        ("Relu", TensorProto.UINT16, "Relu does not take UINT16"),
        ("Identity", TensorProto.COMPLEX64, "Identity does not take COMPLEX64"),
        ("Identity", TensorProto.STRING, "Identity does not take STRING"),
        ("Add", TensorProto.BOOL, "Add does not take BOOL"),
    ],
)
def test_types_are_held_against_the_table(operator: str, dtype: int, complaint: str) -> None:
    inputs = ["x"] if operator == "Add" else []
    assert errors(check(node(operator, *inputs), dtype=dtype)) == [complaint]


def test_double_is_a_warning_and_int64_is_native() -> None:
    report = check(node("Relu"), dtype=DOUBLE)
    assert report.convertible
    assert warnings(report) == ["Relu has DOUBLE computed as FLOAT"]
    assert not check(node("Add", "one"), dtype=INT64, one=np.int64(1)).findings


def test_types_are_inferred_through_the_graph() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["c"], to=TensorProto.INT8), helper.make_node("Relu", ["c"], ["y"])]
    assert errors(check(*nodes)) == ["Cast does not take INT8", "Relu does not take INT8"]


def test_a_tensor_has_at_most_eight_axes() -> None:
    eight, nine = [1] * 6 + [8, 24], [1] * 7 + [8, 24]
    assert errors(check(node("Reshape", "to"), shape=(1, 3, 8, 8), to=nine)) == ["Reshape has a tensor of more than 8 axes"]
    assert check(node("Reshape", "to"), shape=(1, 3, 8, 8), to=eight).convertible


@pytest.mark.parametrize(
    ("k", "complaint"), [(5, None), (MAX_K - 1, None), (MAX_K, "needs K below 3840")], ids=["small", "largest", "too large"]
)
def test_top_k_is_limited(k: int, complaint: str | None) -> None:
    report = check(helper.make_node("TopK", ["x", "k"], ["y", "i"]), k=[k])
    assert errors(report) == ([] if complaint is None else [f"TopK {complaint}"])
    assert errors(check(helper.make_node("TopK", ["x", "k"], ["y", "i"], sorted=0), k=[5])) == ["TopK does not take sorted=0"]
    assert warnings(check(helper.make_node("TopK", ["x", "k"], ["y", "i"]), others={"k": INT64}))


@pytest.mark.parametrize(
    ("operator", "what"),
    [("CumSum", "axis"), ("Squeeze", "axes"), ("Unsqueeze", "axes"), ("ReduceMean", "axes"), ("ReduceL2", "axes")],
)
def test_axes_must_be_constants(operator: str, what: str) -> None:
    assert check(node(operator, "axes"), axes=np.int64(1) if operator == "CumSum" else [1]).convertible
    assert errors(check(node(operator, "axes"), others={"axes": INT64})) == [f"{operator} needs `{what}` as a constant"]


def test_a_constant_node_is_a_constant_too() -> None:
    axes = helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([1])))
    assert check(axes, node("ReduceMean", "axes")).convertible


def test_quantization_is_symmetric() -> None:
    scale, zero = np.float32(0.1), np.int8(0)
    assert check(node("QuantizeLinear", "s", "z"), s=scale, z=zero).convertible
    assert errors(check(node("QuantizeLinear", "s", "z"), s=scale, z=np.int8(3))) == ["QuantizeLinear needs a zero point of 0"]
    assert errors(check(node("QuantizeLinear", "s", "z"), s=scale, z=np.uint8(0))) == ["QuantizeLinear does not quantize to UINT8"]
    assert errors(check(node("QuantizeLinear", "s"), s=scale)) == ["QuantizeLinear does not quantize to UINT8"]
    assert errors(check(node("DequantizeLinear", "s", "z"), dtype=TensorProto.INT8, s=scale, z=np.int8(1))) == [
        "DequantizeLinear needs a zero point of 0"
    ]
    assert errors(check(node("DequantizeLinear", "s", "z"), dtype=UINT8, s=scale, z=np.uint8(0))) == [
        "DequantizeLinear does not take UINT8"
    ]


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({"mode": "linear"}, None),
        ({"mode": "linear", "antialias": 1}, "does not take antialias=1"),
        ({"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize"),
        ({"mode": "linear", "keep_aspect_ratio_policy": "not_larger"}, "not_larger"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_resize_has_modes(attributes: dict[str, Any], complaint: str | None) -> None:
    report = check(node("Resize", "", "scales", **attributes), scales=np.array([1, 1, 2, 2], np.float32))
    assert report.convertible == (complaint is None)
    assert complaint is None or complaint in errors(report)[0]


def test_cautions_do_not_forbid() -> None:
    cubic = check(node("Resize", "", "scales", mode="cubic"), scales=np.array([1, 1, 2, 2], np.float32))
    sample = check(node("GridSample", "grid"), others={"grid": FLOAT})
    for report in (cubic, sample, check(node("NonZero"))):
        assert report.convertible
        assert len(warnings(report)) == 1


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2]), "MaxPool does not take dilations"),
        (helper.make_node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2, 2]), "MaxPool has only its first output"),
        (helper.make_node("BatchNormalization", ["x", *"smvw"], ["y"], training_mode=1), "does not take training_mode=1"),
        (helper.make_node("LayerNormalization", ["x", "s"], ["y", "mean"]), "LayerNormalization has only its first output"),
        (helper.make_node("ScatterND", ["x", "i", "u"], ["y"], reduction="add"), "ScatterND does not take reduction=add"),
        (helper.make_node("LpNormalization", ["x"], ["y"], p=3), "LpNormalization does not take p=3"),
        (helper.make_node("Dropout", ["x", "", "flag"], ["y"]), "Dropout does not train"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_other_limits(wrong: onnx.NodeProto, complaint: str) -> None:
    found = errors(check(wrong, others={"flag": TensorProto.BOOL}))
    assert len(found) == 1
    assert complaint in found[0]


def test_pooling_is_over_two_or_three_axes() -> None:
    pool = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2])
    assert errors(check(pool, shape=("batch", 3, 8))) == ["AveragePool does not take 3 axes"]


def test_subgraphs_and_functions_are_looked_into() -> None:
    branch = helper.make_graph(
        [helper.make_node("Det", ["x"], ["d"])], "branch", [], [helper.make_tensor_value_info("d", FLOAT, None)]
    )
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    assert check(choice, others={"flag": TensorProto.BOOL}).findings[0].count == 2
    function = helper.make_function(
        "mine", "F", ["a"], ["b"], [helper.make_node("Det", ["a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    graph = helper.make_graph(
        [helper.make_node("F", ["x"], ["y"], domain="mine")],
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    report = check_tensorrt(helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10))
    assert errors(report) == ["Det is not supported by the parser"]


def test_large_weights_are_neither_needed_nor_copied() -> None:
    """The data of a large weight may lie in another file that is not at hand."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Det", ["m"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert errors(check_tensorrt(model)) == ["Det is not supported by the parser"]
