"""A user's own ONNX file: what it fixes itself, and what the flags must say."""

import hashlib
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from export.load import load
from export.spec import ExportError, ExportRequest, OnnxInterface, PreprocessingOverrides
from tests.export.small_onnx import CLASSES, SIZE, make_classifier

FLAGS: dict[str, Any] = {"resize": SIZE, "mean": (0.5,), "std": (0.25,)}


def request(directory: Path, model: onnx.ModelProto, flags: dict[str, Any] = FLAGS, **fields: Any) -> ExportRequest:
    onnx.save(model, directory / "theirs.onnx")
    return ExportRequest(f"onnx/{directory / 'theirs.onnx'}", directory, preprocessing=PreprocessingOverrides(**flags), **fields)


def test_a_file_says_its_size_and_classes(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join("abcde"))
    loaded = load(request(tmp_path, make_classifier(), labels=tmp_path / "labels.txt", activation="sigmoid"))

    assert (loaded.preprocessing.height, loaded.preprocessing.width) == (SIZE, SIZE)
    assert (loaded.num_classes, loaded.labels, loaded.activation) == (CLASSES, tuple("abcde"), "sigmoid")
    assert loaded.onnx == OnnxInterface()
    assert (loaded.source.library, loaded.source.weights, loaded.source.checkpoint) == ("onnx", "embedded", "theirs.onnx")
    assert loaded.source.checkpoint_sha256 == hashlib.sha256((tmp_path / "theirs.onnx").read_bytes()).hexdigest()


def test_a_free_size_needs_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--input-size"):
        load(request(tmp_path, make_classifier(size="side")))

    loaded = load(request(tmp_path, make_classifier(size="side"), FLAGS | {"input_size": (12, 10)}))
    assert (loaded.preprocessing.height, loaded.preprocessing.width) == (12, 10)


def test_normalisation_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--resize, --mean, --std"):
        load(request(tmp_path, make_classifier(), {}))


@pytest.mark.parametrize(
    ("model", "flags", "fields", "message"),
    [
        (make_classifier(), {"input_size": (20, 20), "resize": 20}, {}, "takes images of 16x16, not 20x20"),
        (make_classifier(), {}, {"num_classes": 9}, "has 5 classes, not 9"),
        (make_classifier("NHWC"), {}, {}, "not NCHW with 3 channels"),
        (make_classifier(), {}, {"onnx": OnnxInterface("NHWC")}, "not NHWC with 3 channels"),
        (make_classifier(), {}, {"onnx": OnnxInterface(output_name="features")}, "has no output 'features'"),
    ],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, model: onnx.ModelProto, flags: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        load(request(tmp_path, model, FLAGS | flags, **fields))


def test_an_input_of_integers_is_no_normalised_image(tmp_path: Path) -> None:
    model = make_classifier()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["input"], ["floats"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "floats"

    with pytest.raises(ExportError, match="not a float tensor"):
        load(request(tmp_path, model))


def test_an_output_that_is_no_row_of_classes(tmp_path: Path) -> None:
    model = make_classifier()
    del model.graph.node[-2:]
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 8, 1, 1]))

    with pytest.raises(ExportError, match=r"gives \[1, 8, 1, 1\] for one image"):
        load(request(tmp_path, model))


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    for name in ("broken.onnx", "nowhere.onnx"):
        with pytest.raises(ExportError, match=name):
            load(ExportRequest(f"onnx/{tmp_path / name}", tmp_path))
