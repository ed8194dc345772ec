"""Third stage of an export: the fused graph becomes an ONNX file that onnxruntime, Triton and TensorRT read."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from app.manifest import Precision, TensorSpec
from export.compose import MAX_IR, MAX_OPSET
from export.macs import count_macs
from export.operators import check_tensorrt
from export.precision import HALVES, to_half
from export.spec import Engine, ExportError, FreeAxes, Fused

_PROTOBUF_LIMIT = 2**31 - 2**24  # bytes; some room for the graph itself
_DATA_SUFFIX = ".data"
_FOLD_LIMIT = 2**26  # bytes of a constant that is computed ahead, such as a table of position biases


def to_onnx(fused: Fused, path: Path, precision: Precision) -> Engine:
    """Write `path` (and `path`.data when the weights do not fit into one protobuf): the graph, for any batch.

    Raises:
        ExportError: the network cannot be exported with a free batch axis; int8.
    """
    if precision not in ("fp32", *HALVES):
        raise ExportError(f"Precision {precision} is not exported; choose fp32, fp16 or bf16.")
    if isinstance(fused.graph, nn.Module):
        model = _export(fused.graph, fused)
    else:
        model = ir.serde.deserialize_model(fused.graph)
        common.ShapeInferencePass(strict_mode=False)(model)
    _check_batch(model)
    _keep_names_apart(model)
    _tidy(model)
    model.graph.name = fused.interface.role
    before_tail = model.graph.outputs.pop() if fused.exact_tail else None
    del model.graph.outputs[len(fused.interface.outputs) :]
    if precision in HALVES and not fused.typed:
        to_half(model, HALVES[precision], before_tail)
    external_data = _save(model, path)
    graph = onnx.load(path, load_external_data=False)
    return Engine(
        path=path,
        interface=fused.interface,
        kind="onnx",
        precision=precision,
        opset=model.opset_imports[""],
        ir_version=model.ir_version,
        parameters=fused.parameters,
        macs=count_macs(graph),
        tensorrt=check_tensorrt(graph),
        external_data=external_data,
    )


def _export(graph: nn.Module, fused: Fused) -> ir.Model:
    inputs, outputs = fused.interface.inputs, fused.interface.outputs
    examples, axes = _batched(inputs) if fused.free is None else _free(inputs, fused.free)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                examples,
                input_names=[spec.name for spec in inputs],
                output_names=[*(spec.name for spec in (*outputs, *fused.inner)), *(["before_tail"] if fused.exact_tail else [])],
                dynamic_shapes=_nested(graph, axes),
                opset_version=MAX_OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise ExportError(f"torch cannot export the network with a free batch axis: {type(cause).__name__}: {cause}") from error
    if program is None:
        raise ExportError("torch gave no ONNX program.")
    return program.model


def _batched(inputs: Sequence[TensorSpec]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """An example of every input, and the batch as their only free axis."""
    batch = torch.export.Dim("batch", min=1)
    examples = tuple(torch.ones((2, *spec.shape[1:]), dtype=getattr(torch, spec.dtype)) for spec in inputs)
    return examples, tuple({0: batch} for _ in inputs)


def _free(inputs: Sequence[TensorSpec], axes: FreeAxes) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """An example of every input and its free axes; two axes of one name have one size.

    The sizes are multiples of 4, as the patches of an image are, and no two alike. Indices and lengths are 1.
    """
    names = list(dict.fromkeys(name for each in axes for name in each if name is not None))
    sizes = {name: 4 * (2 + place) for place, name in enumerate(names)}
    examples = []
    for spec, named in zip(inputs, axes, strict=True):
        shape = [size if name is None else sizes[name] for name, size in zip(named, spec.shape, strict=True)]
        examples.append(torch.ones(shape, dtype=getattr(torch, spec.dtype)))
    free = tuple({axis: torch.export.Dim.AUTO for axis, name in enumerate(each) if name is not None} for each in axes)
    return tuple(examples), free


def _nested(graph: nn.Module, axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """`axes` of each input as torch wants them: those of `*arguments` in a tuple of their own."""
    parameters = list(inspect.signature(graph.forward).parameters.values())
    if parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return axes
    named = len(parameters) - 1
    return (*axes[:named], axes[named:])


def _check_batch(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and isinstance(value.shape[0], int):
            raise ExportError(
                f"The network fixes the batch at {value.shape[0]}. In its forward, take the batch size from x.shape[0]; "
                "len(x) and int(...) make a constant of it."
            )


def _keep_names_apart(model: ir.Model) -> None:
    """The exporter calls values after the operators of torch; where an output has the name of one, the inner value gets another."""
    outputs = {value.name: value for value in model.graph.outputs}
    for value in [value for node in model.graph for value in node.outputs]:
        if value.name in outputs and value is not outputs[value.name]:
            value.name = f"{value.name}_inside"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns and logs about its own internals; what is wrong with the network, it raises."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tidy(model: ir.Model) -> None:
    """Compute ahead what no image changes, and drop what does nothing: paddings by 0, doubled and unused nodes.

    The exporter's notes go too; they hold paths of this machine.
    """
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Pad" else None
        if source is not None and _pads_nothing(node) and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
    _take_shape_of_floats(model)
    _hold_constants(model)
    fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.ir_version = min(model.ir_version, MAX_IR)


def _take_shape_of_floats(model: ir.Model) -> None:
    """Let the batch size be read off the cast pixels: TensorRT takes uint8 nowhere but into a cast."""
    image = model.graph.inputs[0]
    readers = image.consumers()
    cast = next((node for node in readers if node.op_type == "Cast"), None)
    for node in readers:
        if node.op_type == "Shape" and cast is not None:
            node.replace_input_with(0, cast.outputs[0])
    common.TopologicalSortPass()(model)


def _hold_constants(model: ir.Model) -> None:
    """Give the graph those constants that only their readers know: fusing Clips, the optimiser may lose their bounds."""
    held = model.graph.initializers
    for value in [value for node in model.graph for value in node.inputs if value is not None]:
        loose = value.const_value is not None and value.producer() is None and not value.is_graph_input()
        if loose and held.get(value.name or "") is not value:
            value.name = f"constant_{len(held)}"
            model.graph.register_initializer(value)


def _pads_nothing(node: ir.Node) -> bool:
    amounts = node.inputs[1].const_value if node.inputs[1] is not None else None
    return amounts is not None and not amounts.numpy().any()


def _save(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write the model and check it; its weights lie in a file of their own only where one protobuf cannot hold them."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    data = path.with_name(path.name + _DATA_SUFFIX) if size > _PROTOBUF_LIMIT else None
    ir.save(model, path, external_data=data.name if data else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise ExportError(f"The exported graph is not valid ONNX: {error}") from error
    return (data,) if data else ()
