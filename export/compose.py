"""Pre- and postprocessing put around a user's own ONNX graph, so that it keeps the engine contract."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper, version_converter
from onnx.utils import Extractor

from app.manifest import Preprocessing
from export.onnx_network import OnnxNetwork
from export.spec import Activation, ExportError, OnnxInterface

MAX_OPSET = 20
MAX_IR = 10
_MIN_OPSET = 13  # from here on Softmax means what torch means
PREFIX = "network/"

Step = tuple[str, list[str], dict[str, Any]]  # operator, constants, attributes


def compose_classifier(
    model: onnx.ModelProto, interface: OnnxInterface, preprocessing: Preprocessing, activation: Activation
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """uint8 [B,H,W,3] -> cast, normalise, colour order, layout -> `model` -> probabilities float32 [B,C].

    Returns the graph and what had to be rewritten.

    Raises:
        ExportError: the batch is fixed, the opset cannot be converted, or the output needs inputs other than the image.
    """
    network = OnnxNetwork(model, interface)
    core, rewrites = compose_network(network, preprocessing)
    after = helper.make_model(_after(network, activation), opset_imports=_standard(core), ir_version=core.ir_version)
    try:
        whole = compose.merge_models(core, after, io_map=[(PREFIX + network.output.name, "raw")])
        onnx.checker.check_model(whole)
    except Exception as error:
        raise ExportError(f"The model cannot be joined to its postprocessing: {error}") from error
    return whole, rewrites


def compose_network(network: OnnxNetwork, preprocessing: Preprocessing) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """uint8 [B,H,W,3] -> cast, normalise, colour order, layout -> the outputs of `network`, whose names begin with `PREFIX`.

    Returns the graph and what had to be rewritten.

    Raises:
        ExportError: the batch is fixed, the opset cannot be converted, or an output needs inputs other than the image.
    """
    model = _at_supported_version(_only(network))
    rewrites: tuple[str, ...] = ()
    if network.fixed_batch is not None:
        model, rewrites = _with_free_batch(model, network, preprocessing), ("free-batch",)
    before = helper.make_model(_before(network, preprocessing), opset_imports=_standard(model), ir_version=model.ir_version)
    core = compose.add_prefix(model, PREFIX)
    del core.graph.value_info[:]
    try:
        return compose.merge_models(before, core, io_map=[("normalised", PREFIX + network.input.name)]), rewrites
    except Exception as error:
        raise ExportError(f"The model cannot be joined to its preprocessing: {error}") from error


def _standard(model: onnx.ModelProto) -> list[onnx.OperatorSetIdProto]:
    """The version of the standard operators."""
    return [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]


def _only(network: OnnxNetwork) -> onnx.ModelProto:
    """The part of the model between the image and the wanted outputs."""
    model = network.model
    weights = {tensor.name for tensor in model.graph.initializer}
    names = {value.name for value in model.graph.input} - weights
    wanted = [value.name for value in network.outputs]
    if names == {network.input.name} and len(model.graph.output) == len(wanted):
        return model
    try:
        part = Extractor(model).extract_model([network.input.name], wanted)
        onnx.checker.check_model(part)
    except Exception as error:
        others = ", ".join(sorted(names - {network.input.name}))
        raise ExportError(f"The output {', '.join(wanted)} needs more than the image ({others}).") from error
    return part


def _at_supported_version(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at an opset and IR version that current Triton images load, without the weights that IR 3 lists as inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    model = copy
    model.ir_version = min(max(model.ir_version, 8), MAX_IR)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    target = min(max(opset, _MIN_OPSET), MAX_OPSET)
    if opset != target:
        try:
            model = version_converter.convert_version(model, target)
        except Exception as error:
            raise ExportError(f"The model's opset {opset} cannot be converted to {target}: {error}") from error
        model.ir_version = min(max(model.ir_version, 8), MAX_IR)
    return model


def _with_free_batch(model: onnx.ModelProto, network: OnnxNetwork, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Free the batch axis of a model exported for one image, and make sure that every row is still answered on its own."""
    refusal = f"The model's batch is fixed at {network.fixed_batch}; export it again with a free (dynamic) batch axis."
    if network.fixed_batch != 1:
        raise ExportError(refusal)
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    for value in (*freed.graph.input, *freed.graph.output):
        if value.name in (network.input.name, *(output.name for output in network.outputs)):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    _free_reshapes(freed)
    shape = (3, 3, preprocessing.height, preprocessing.width)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    try:
        together = OnnxNetwork(freed, network.interface, [output.name for output in network.outputs]).run_all(images)
    except ExportError as error:
        raise ExportError(refusal) from error
    if not all(map(_alike, together, network.run_all(images))):
        raise ExportError(refusal)
    return freed


def _alike(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-4)


def _free_reshapes(model: onnx.ModelProto) -> None:
    """Constant shapes [1, ...] of Reshape nodes follow the batch: by -1, or by 0 (copy) where -1 is taken."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    for name in {node.input[1] for node in model.graph.node if node.op_type == "Reshape"} & constants.keys():
        shape = numpy_helper.to_array(constants[name]).copy()
        if shape.size > 1 and shape[0] == 1:
            shape[0] = 0 if -1 in shape else -1
            constants[name].CopyFrom(numpy_helper.from_array(shape, constants[name].name))


def _before(network: OnnxNetwork, preprocessing: Preprocessing) -> onnx.GraphProto:
    """image uint8 [batch,H,W,3] -> normalised, in the layout, colour order and precision of the network."""
    planar = network.interface.layout == "NCHW"
    per_channel = (1, 3, 1, 1) if planar else (3,)
    std = np.array(preprocessing.std)
    gain = (preprocessing.scale / std).astype(np.float32).reshape(per_channel)
    offset = (-np.array(preprocessing.mean) / std).astype(np.float32).reshape(per_channel)
    constants = [numpy_helper.from_array(gain, "gain"), numpy_helper.from_array(offset, "offset")]
    steps: list[Step] = [("Cast", [], {"to": TensorProto.FLOAT})]
    steps += [("Transpose", [], {"perm": [0, 3, 1, 2]})] if planar else []
    steps += [("Mul", ["gain"], {}), ("Add", ["offset"], {})]
    if network.interface.colour == "BGR":
        constants.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
        steps.append(("Gather", ["bgr"], {"axis": 1 if planar else 3}))
    if network.dtype != TensorProto.FLOAT:
        steps.append(("Cast", [], {"to": network.dtype}))
    height, width = preprocessing.height, preprocessing.width
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", height, width, 3])
    shape: list[str | int | None] = ["batch", 3, height, width] if planar else ["batch", height, width, 3]
    normalised = helper.make_tensor_value_info("normalised", network.dtype, shape)
    return helper.make_graph(_chain(steps, "image", "normalised"), "preprocessing", [image], [normalised], constants)


def _after(network: OnnxNetwork, activation: Activation) -> onnx.GraphProto:
    """The network's output -> probabilities float32 [batch,C]."""
    dtype = network.output.type.tensor_type.elem_type
    steps: list[Step] = [("Cast", [], {"to": TensorProto.FLOAT})] if dtype != TensorProto.FLOAT else []
    if network.interface.output != "probabilities":
        steps.append(("Softmax", [], {"axis": -1}) if activation == "softmax" else ("Sigmoid", [], {}))
    classes = network.output.type.tensor_type.shape.dim[-1].dim_value or None
    raw = helper.make_tensor_value_info("raw", dtype, ["batch", classes])
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes])
    return helper.make_graph(
        _chain(steps or [("Identity", [], {})], "raw", "probabilities"), "postprocessing", [raw], [probabilities]
    )


def _chain(steps: list[Step], first: str, last: str) -> list[onnx.NodeProto]:
    """Nodes that each take the one before; the ends are named."""
    names = [first, *(f"{first}_{index}" for index in range(1, len(steps))), last]
    return [
        helper.make_node(kind, [names[index], *constants], [names[index + 1]], name=f"{first}_{kind.lower()}_{index}", **attributes)
        for index, (kind, constants, attributes) in enumerate(steps)
    ]
