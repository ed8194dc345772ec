"""A user's own ONNX classifier, whatever its shape, becomes an engine that answers as the user's own code does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from app.manifest import Preprocessing, Source
from export.agreement import TOLERANCES, Scores, compare, distance
from export.fuse import fuse_classifier
from export.informative import sample_images
from export.onnx_network import OnnxNetwork
from export.spec import ExportError, Loaded, OnnxInterface, image_tensor
from export.to_onnx import to_onnx
from tests.export.small_onnx import CLASSES, SIZE, make_classifier

PREPROCESSING = Preprocessing(
    height=SIZE,
    width=SIZE,
    policy="stretch",
    resize_height=SIZE,
    resize_width=SIZE,
    interpolation="bilinear",
    scale=1 / 128,
    mean=(1.0, 0.9, 0.8),
    std=(0.5, 0.6, 0.7),
)
IMAGES = sample_images(PREPROCESSING, 8, seed=2)
IMAGES_NORMALISED = image_tensor(IMAGES, PREPROCESSING).numpy()


def make_loaded(model: onnx.ModelProto, interface: OnnxInterface, **fields: Any) -> Loaded:
    source = Source(library="onnx", architecture="theirs", weights="embedded")
    return replace(Loaded(model, PREPROCESSING, CLASSES, (), "softmax", source, interface), **fields)


def answers(loaded: Loaded, directory: Path, images: torch.Tensor = IMAGES) -> np.ndarray:
    """Through the whole of fuse and to_onnx."""
    engine = to_onnx(fuse_classifier(loaded), directory / "model.onnx", "fp32")
    assert engine.opset is not None
    assert 13 <= engine.opset <= 20
    assert (engine.ir_version or 99) <= 10
    session = onnxruntime.InferenceSession(engine.path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.type, value.shape) for value in session.get_inputs()] == [
        ("image", "tensor(uint8)", ["batch", SIZE, SIZE, 3])
    ]
    probabilities: np.ndarray = session.run(["probabilities"], {"image": images.numpy()})[0]
    assert probabilities.dtype == np.float32
    return probabilities


def by_hand(model: onnx.ModelProto, layout: str = "NCHW", colour: str = "RGB") -> np.ndarray:
    """What the user's own code does, one image at a time; the model gives logits."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = []
    for image in IMAGES.numpy().astype(np.float64):
        pixels = (image / 128 - (1.0, 0.9, 0.8)) / (0.5, 0.6, 0.7)
        pixels = pixels[..., ::-1] if colour == "BGR" else pixels
        pixels = pixels.transpose(2, 0, 1) if layout == "NCHW" else pixels
        dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
        rows.append(session.run(None, {"input": np.ascontiguousarray(pixels[None], dtype)})[0][0].astype(np.float64))
    odds = np.exp(np.stack(rows))
    return odds / odds.sum(-1, keepdims=True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_layout_and_colour_order(layout: Any, colour: Any, tmp_path: Path) -> None:
    model = make_classifier(layout)
    loaded = make_loaded(model, OnnxInterface(layout, colour))

    np.testing.assert_allclose(answers(loaded, tmp_path), by_hand(model, layout, colour), atol=1e-5)


def test_the_wrong_colour_order_would_show(tmp_path: Path) -> None:
    model = make_classifier()

    assert np.abs(answers(make_loaded(model, OnnxInterface(colour="BGR")), tmp_path) - by_hand(model)).max() > 0.05


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (13, 7), (20, 9), (21, 10), (22, 11)])
def test_old_and_new_versions_are_converted(opset: int, ir_version: int, tmp_path: Path) -> None:
    model = make_classifier(opset=opset, ir_version=ir_version)

    np.testing.assert_allclose(answers(make_loaded(model, OnnxInterface()), tmp_path), by_hand(model), atol=1e-5)


@pytest.mark.parametrize("reshape", [False, True])
def test_a_batch_fixed_at_one_is_freed(reshape: bool, tmp_path: Path) -> None:
    model = make_classifier(batch=1, reshape=reshape)
    loaded = make_loaded(model, OnnxInterface())

    assert fuse_classifier(loaded).rewrites == ("free-batch",)
    np.testing.assert_allclose(answers(loaded, tmp_path), by_hand(model), atol=1e-5)


def test_a_batch_that_cannot_be_freed_is_refused() -> None:
    model = make_classifier(batch=1)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([5], np.int64), "five"))
    graph.node[-1].output[0] = "row"
    graph.node.append(helper.make_node("Reshape", ["row", "five"], ["list"]))
    graph.node.append(helper.make_node("Reshape", ["list", "one_five"], ["logits"]))
    graph.initializer.append(numpy_helper.from_array(np.array([1, 5], np.int64), "one_five"))

    with pytest.raises(ExportError, match="batch is fixed at 1; export it again"):
        fuse_classifier(make_loaded(model, OnnxInterface()))


def test_a_larger_fixed_batch_is_refused() -> None:
    with pytest.raises(ExportError, match="batch is fixed at 4"):
        fuse_classifier(make_loaded(make_classifier(batch=4), OnnxInterface()))


def test_a_model_that_gives_probabilities(tmp_path: Path) -> None:
    model = make_classifier(output="probabilities")
    loaded = make_loaded(model, OnnxInterface(output="probabilities"))
    expected = by_hand(make_classifier())

    np.testing.assert_allclose(answers(loaded, tmp_path), expected, atol=1e-5)
    logits = fuse_classifier(loaded).reference(image_tensor(IMAGES, PREPROCESSING))
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=1e-5)


def test_the_reference_runs_the_users_file() -> None:
    model = make_classifier("NHWC", batch=1)
    reference = fuse_classifier(make_loaded(model, OnnxInterface("NHWC", "BGR"))).reference

    logits = reference(image_tensor(IMAGES, PREPROCESSING))
    np.testing.assert_allclose(logits.softmax(-1).numpy(), by_hand(model, "NHWC", "BGR"), atol=1e-5)


def test_sigmoid(tmp_path: Path) -> None:
    loaded = make_loaded(make_classifier(), OnnxInterface(), activation="sigmoid")
    expected = fuse_classifier(loaded).reference(image_tensor(IMAGES, PREPROCESSING)).sigmoid()

    np.testing.assert_allclose(answers(loaded, tmp_path), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("logit", [-40.0, 0.0, 12.0])
def test_several_labels_at_once_as_probabilities_are_what_the_reference_says(logit: float, tmp_path: Path) -> None:
    """Also where they are almost 0 or 1."""
    model = make_classifier(output="probabilities", activation="Sigmoid", bias=logit)
    loaded = make_loaded(model, OnnxInterface(output="probabilities"), activation="sigmoid")
    served = Scores.of_probabilities(answers(loaded, tmp_path), "sigmoid")
    reference = Scores.of_logits(fuse_classifier(loaded).reference(image_tensor(IMAGES, PREPROCESSING)).numpy(), "sigmoid")

    assert all(check.passed for check in compare("it", served, reference, TOLERANCES["fp32"].engine))


def test_a_probability_of_zero_is_what_the_reference_says() -> None:
    model = make_classifier(output="probabilities")
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    head.CopyFrom(numpy_helper.from_array(np.array([0, 0, 0, 0, -500], np.float32), "bias"))
    loaded = make_loaded(model, OnnxInterface(output="probabilities"))
    served = Scores.of_probabilities(OnnxNetwork(model, OnnxInterface()).run(IMAGES_NORMALISED), "softmax")
    reference = Scores.of_logits(fuse_classifier(loaded).reference(torch.from_numpy(IMAGES_NORMALISED)).numpy(), "softmax")

    assert distance(served, reference, 1.0).max() < 1e-3


def test_a_model_in_half_precision(tmp_path: Path) -> None:
    model = make_classifier(dtype=TensorProto.FLOAT16)

    np.testing.assert_allclose(answers(make_loaded(model, OnnxInterface()), tmp_path), by_hand(model), atol=1e-3)


def test_work_and_parameters_are_counted(tmp_path: Path) -> None:
    loaded = make_loaded(make_classifier(), OnnxInterface())
    fused = fuse_classifier(loaded)

    assert fused.parameters == 8 * 75 + CLASSES * 8 + CLASSES
    assert to_onnx(fused, tmp_path / "m.onnx", "fp32").macs == 6 * 6 * 8 * 75 + CLASSES * 8


def with_second_input(used: bool) -> onnx.ModelProto:
    model = make_classifier()
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, [1]))
    target = "logits" if used else "features_only"
    if used:
        model.graph.node[-1].output[0] = "row"
        model.graph.node.append(helper.make_node("Mul", ["row", "gain"], [target]))
    else:
        model.graph.node.append(helper.make_node("Mul", ["flat", "gain"], [target]))
        model.graph.output.append(helper.make_tensor_value_info(target, TensorProto.FLOAT, ["batch", 8]))
    return model


def test_several_inputs_and_outputs_are_named(tmp_path: Path) -> None:
    model = with_second_input(used=False)

    with pytest.raises(ExportError, match=r"several inputs; name one of them \(--input-name\): input, gain"):
        fuse_classifier(make_loaded(model, OnnxInterface()))
    with pytest.raises(ExportError, match=r"several outputs; name one of them \(--output-name\): logits, features_only"):
        fuse_classifier(make_loaded(model, OnnxInterface(input_name="input")))
    with pytest.raises(ExportError, match="has no input 'picture'"):
        fuse_classifier(make_loaded(model, OnnxInterface(input_name="picture")))
    loaded = make_loaded(model, OnnxInterface(input_name="input", output_name="logits"))
    np.testing.assert_allclose(answers(loaded, tmp_path), by_hand(make_classifier()), atol=1e-5)


def test_an_output_that_needs_another_input_is_refused() -> None:
    with pytest.raises(ExportError, match=r"logits needs more than the image \(gain\)"):
        fuse_classifier(make_loaded(with_second_input(used=True), OnnxInterface(input_name="input")))


def test_the_users_model_is_left_as_it_is() -> None:
    model = make_classifier(batch=1, reshape=True, opset=21, ir_version=10)
    before = model.SerializeToString()
    fuse_classifier(make_loaded(model, OnnxInterface()))

    assert model.SerializeToString() == before


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_that_are_inputs_too(tmp_path: Path, ir_version: int) -> None:
    model = make_classifier()
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    model.ir_version = ir_version
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    interface = OnnxInterface(input_name=plain.graph.input[0].name)

    np.testing.assert_allclose(
        answers(make_loaded(model, interface), tmp_path), answers(make_loaded(plain, interface), tmp_path), atol=1e-6
    )
