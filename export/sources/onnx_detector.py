"""`onnx/FILE --task detect`: the user's own ONNX detector, weights and all."""

import ast
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from app.manifest import Detection, Preprocessing, Source
from export.detect_options import DetectOptions
from export.detection_head import DetectionHead, Family, family_of, resolve_head
from export.golden import golden_images
from export.labels import choose_labels, read_labels
from export.onnx_detector import OnnxDetector
from export.onnx_network import OnnxNetwork
from export.preprocessing import finish
from export.reference import reference_pixels
from export.spec import ExportError, ExportRequest, LoadedDetector, PreprocessingOverrides, image_tensor

_BORDER = (114, 114, 114)  # the grey of the YOLO family's letterbox
_INVERTED = 0.2  # of the boxes may end before they begin; a few do while a network is not sure


def load_detector(request: ExportRequest, options: DetectOptions, model: onnx.ModelProto, source: Source) -> LoadedDetector:
    """Hold what the flags say of the outputs against what the model gives for images.

    Raises:
        ExportError: flags that are missing, or fit neither one another nor what was found.
    """
    family = family_of(options, _declared(model))
    interface = replace(request.onnx, colour=request.onnx.colour or family.colour)
    names = [value.name for value in model.graph.output]
    network = OnnxNetwork(model, interface, names)
    preprocessing = _preprocessing(request.preprocessing, options, family, network.image_size)
    frame = (preprocessing.height, preprocessing.width)
    blank = network.run_all(np.zeros((1, 3, *frame), np.float32))
    shapes = {name: output.shape for name, output in zip(names, blank, strict=True)}
    known = _known_labels(model)
    classes = request.num_classes or (len(read_labels(request.labels)) if request.labels else len(known)) or None
    head = resolve_head(options, request.onnx, shapes, frame, activation=request.activation, num_classes=classes)
    detector = OnnxDetector(OnnxNetwork(model, interface, [output.name for output in head.outputs]), head).eval()
    _check_values(detector, preprocessing)
    return LoadedDetector(
        network=detector,
        preprocessing=preprocessing,
        detection=Detection(queries=head.rows, classes=head.classes, score="objectness" if head.objectness else head.activation),
        labels=choose_labels(request.labels, known, head.classes),
        source=source,
    )


def _preprocessing(
    overrides: PreprocessingOverrides, options: DetectOptions, family: Family, fixed: tuple[int, int] | None
) -> Preprocessing:
    """The whole image in the frame, as the flags say or the family is used to."""
    size = overrides.input_size or fixed
    fit = options.letterbox or ("stretch" if overrides.resize is not None else family.fit)
    known = {
        "--input-size": size,
        "--letterbox centre|corner (or --resize HxW to stretch)": fit,
        "--mean": overrides.mean or family.plain_pixels or None,
        "--std": overrides.std or family.plain_pixels or None,
    }
    missing = [flag for flag, value in known.items() if value is None]
    if size is None or fit is None or missing:
        raise ExportError(f"Nothing says how images are prepared for this detector; give {', '.join(missing)}.")
    if fixed is not None and fixed != size:
        raise ExportError(f"The model takes images of {fixed[0]}x{fixed[1]}, not {size[0]}x{size[1]}.")
    if overrides.resize not in (None, size) or (overrides.resize is not None and options.letterbox is not None):
        raise ExportError(
            f"A detector sees the whole image: either --resize {size[0]}x{size[1]} stretches it, or --letterbox fits it in."
        )
    if fit == "stretch" and options.pad is not None:
        raise ExportError("An image that is stretched has no border, so leave --pad out, or give --letterbox.")
    described = finish(
        overrides,
        height=size[0],
        width=size[1],
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bilinear",
        policy="stretch" if fit == "stretch" else "letterbox",
        resize=size,
        anchor="corner" if fit == "stretch" else fit,
        scale=family.scale,
    )
    return described if fit == "stretch" else described.model_copy(update={"fill": _levels(options.pad or _BORDER)})


def _levels(pad: tuple[int, ...]) -> tuple[int, ...]:
    levels = pad * 3 if len(pad) == 1 else pad
    if len(levels) != 3 or max(levels) > 255:
        raise ExportError(f"--pad takes one level of 0 to 255 or three (R, G, B), not {','.join(map(str, pad))}.")
    return levels


def _declared(model: onnx.ModelProto) -> dict[str, tuple[Any, ...]]:
    """The outputs as the file describes them: sizes, or names of free ones."""
    return {
        value.name: tuple(dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.output
    }


def _known_labels(model: onnx.ModelProto) -> tuple[str, ...]:
    """The names that Ultralytics writes into its files: `{0: 'person', ...}`; none where there are none to be read."""
    text = next((entry.value for entry in model.metadata_props if entry.key == "names"), "")
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    return tuple(map(str, names.values() if isinstance(names, Mapping) else names if isinstance(names, list | tuple) else ()))


def _check_values(detector: OnnxDetector, preprocessing: Preprocessing) -> None:
    """What the flags say must make sense of what the detector says of a few images.

    Raises:
        ExportError: boxes that end before they begin, or of another scale than the frame's; scores that are no shares, or logits
            that are. Says what was found.
    """
    head = detector.head
    images = torch.from_numpy(np.stack([reference_pixels(image.data, preprocessing) for image in golden_images() if image.travels]))
    with torch.inference_mode():
        features = detector.encode(image_tensor(images, preprocessing), None)
        queries = detector.decode(features, head.frame, None)
    boxes, scores = queries.boxes.numpy(), queries.logits.numpy()
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ExportError("The model gives values that are no numbers for ordinary images; look at --mean, --std and --scale.")
    _check_scores(detector.raw_scores(features).numpy(), head)
    told = boxes[scores.max(2) > 0] if head.coding == "final" else boxes.reshape(-1, 4)
    if not len(told):
        return
    inverted = np.mean((told[:, 2:] < told[:, :2]).any(1))
    if inverted > _INVERTED:
        raise ExportError(
            f"{inverted:.0%} of the boxes end before they begin, so they are hardly {head.box_format}; see --box-format."
        )
    reach = float(np.quantile(np.abs(told), 0.9))
    if head.box_units == "shares" and reach > 4:
        raise ExportError(f"Boxes reach {reach:.3g} times the frame, so they are hardly shares of it; see --box-units.")
    if head.box_units == "pixels" and reach * min(head.frame) < 2:
        raise ExportError(
            f"Boxes reach {reach * min(head.frame):.2g} pixels of the frame, so they are rather shares; see --box-units."
        )


def _check_scores(raw: NDArray[Any], head: DetectionHead) -> None:
    low, high = float(raw.min()), float(raw.max())
    if not head.logits and (low < -1e-3 or high > 1 + 1e-3):
        raise ExportError(f"Scores lie between {low:.3g} and {high:.3g}, so they are no probabilities; give --output logits.")
    if head.logits and low >= 0 and high <= 1:
        raise ExportError(f"Scores lie between {low:.3g} and {high:.3g}, as probabilities do; give --output probabilities.")
