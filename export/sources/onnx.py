"""`onnx/FILE`: the user's own ONNX classifier or detector, weights and all."""

import hashlib
from pathlib import Path

import numpy as np
import onnx

from app.manifest import Preprocessing
from export.labels import choose_labels
from export.onnx_network import OnnxNetwork
from export.preprocessing import from_overrides
from export.provenance import describe_source
from export.sources.onnx_detector import load_detector
from export.spec import ExportError, ExportRequest, Loaded, LoadedDetector


def load(request: ExportRequest, identifier: str) -> Loaded | LoadedDetector:
    """Read the file and find its input, output and number of classes; of a detector see `load_detector`.

    The input size is the one the file fixes, or `--input-size`; the rest of the preprocessing comes from the flags.

    Raises:
        ExportError: no valid model; several inputs and none named; not one float image in and one [B,C] out; flags missing.
    """
    file = Path(identifier)
    model = _read(file)
    source = describe_source(
        request,
        "onnx",
        file.stem,
        checkpoint=file.name,
        checkpoint_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    if request.detection is not None:
        return load_detector(request, request.detection, model, source)
    network = OnnxNetwork(model, request.onnx)
    preprocessing = from_overrides(request.preprocessing, network.image_size)
    _check_size(network, preprocessing)
    num_classes = _count_classes(network, preprocessing)
    if request.num_classes not in (None, num_classes):
        raise ExportError(f"{file.name} has {num_classes} classes, not {request.num_classes}.")
    return Loaded(
        network=model,
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=choose_labels(request.labels, (), num_classes),
        activation=request.activation or "softmax",
        source=source,
        onnx=request.onnx,
    )


def _read(file: Path) -> onnx.ModelProto:
    if not file.is_file():
        raise ExportError(f"There is no file {file}.")
    try:
        model = onnx.load(file)
        onnx.checker.check_model(file)
    except Exception as error:
        raise ExportError(f"{file.name} is not a valid ONNX model: {error}") from error
    return model


def _check_size(network: OnnxNetwork, preprocessing: Preprocessing) -> None:
    fixed = network.image_size
    if fixed is not None and fixed != (preprocessing.height, preprocessing.width):
        raise ExportError(f"The model takes images of {fixed[0]}x{fixed[1]}, not {preprocessing.height}x{preprocessing.width}.")


def _count_classes(network: OnnxNetwork, preprocessing: Preprocessing) -> int:
    images = np.zeros((1, 3, preprocessing.height, preprocessing.width), np.float32)
    output = network.run(images)
    if output.ndim != 2 or output.shape[0] != 1:
        raise ExportError(f"The model gives {list(output.shape)} for one image; it must give [1, classes].")
    return int(output.shape[1])
