"""The check of a graph against what the TensorRT parser takes; nothing is built, no TensorRT is needed."""

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
from onnx import NodeProto, TensorProto, helper

from app.manifest import Finding, TensorRTReport
from export.operator_limits import LIMITS, Problem, Tensors, bodies, input_name
from export.operator_table import CAUTIONS, DATA_INPUT, MAX_RANK, OPERATORS, OPSETS, OUTPUT_TYPED, PARSER

_STANDARD = ("", "ai.onnx")
_LARGE = 1024  # bytes; weights above it play no part in shape inference


def check_tensorrt(model: onnx.ModelProto) -> TensorRTReport:
    """Hold every node of `model`, its subgraphs and functions included, against the table; no error means `convertible`."""
    tensors = Tensors()
    tensors.learn(model.graph)
    tensors.learn(onnx.shape_inference.infer_shapes(_skeleton(model)).graph)
    found: Counter[tuple[str, str, str]] = Counter()
    opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 0)
    if opset not in OPSETS:
        found["graph", "error", f"has opset {opset}, not one of {OPSETS[0]} to {OPSETS[-1]}"] += 1
    functions = {(function.domain, function.name) for function in model.functions}
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in _all_nodes(nodes):
            if (node.domain, node.op_type) not in functions:
                found.update((node.op_type, severity, message) for severity, message in _check(node, tensors))
    findings = tuple(
        Finding.model_validate({"operator": operator, "count": count, "severity": severity, "message": message})
        for (operator, severity, message), count in sorted(found.items())
    )
    return TensorRTReport(parser=PARSER, convertible=all(f.severity != "error" for f in findings), findings=findings)


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large weights as typed inputs: shapes are inferred from it without copying gigabytes."""
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or len(tensor.raw_data) > _LARGE:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    return onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph)


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from _all_nodes(body.node)


def _check(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    if node.domain not in _STANDARD:
        yield "error", f"is of the domain {node.domain!r} and needs a plugin"
    elif node.op_type not in OPERATORS:
        yield "error", "is not supported by the parser"
    else:
        yield from _check_types(node, tensors)
        if any(tensors.ranks.get(name, 0) > MAX_RANK for name in (*node.input, *node.output)):
            yield "error", f"has a tensor of more than {MAX_RANK} axes"
        if node.op_type in CAUTIONS:
            yield "warning", CAUTIONS[node.op_type]
        for limit in LIMITS.get(node.op_type, ()):
            yield from limit(node, tensors)


def _check_types(node: NodeProto, tensors: Tensors) -> Iterator[Problem]:
    allowed = OPERATORS[node.op_type]
    names = [input_name(node, DATA_INPUT.get(node.op_type, 0)), *(node.output if node.op_type in OUTPUT_TYPED else ())]
    for kind in sorted({tensors.types.get(name, TensorProto.UNDEFINED) for name in names} - {TensorProto.UNDEFINED}):
        if kind == TensorProto.DOUBLE and TensorProto.FLOAT in allowed:
            yield "warning", "has DOUBLE computed as FLOAT"
        elif kind not in allowed:
            yield "error", f"does not take {TensorProto.DataType.Name(kind)}"
