"""Small but real detection and grounding engines in a model repository: what they answer is known, to the pixel.

The detector answers every image with the rows it was made of, but one whose first pixel is white with boxes that are not
numbers. The grounder answers a phrase with the box of its first word.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.manifest import MANIFEST_FILE, Detection, Entry, MaskCoefficients, Preprocessing, TensorSpec, Text, read_entry
from tests.repository import artifact, make_manifest

FRAME = (48, 80)  # height, width: neither square, nor of an image's shape
LABELS = ("circle", "square", "Dreieck")
MASKS = MaskCoefficients(count=6, side=8)
LENGTH = 6
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "circle", "square", "left")

SPOT = np.array([4.0, 0, 0, -1.5, 0, -1.5], np.float32)
"""Coefficients of a mask that is a spot in the middle."""


def letterbox(anchor: str = "corner", **fields: Any) -> Preprocessing:
    """The frame of both engines."""
    height, width = FRAME
    described = {"height": height, "width": width, "policy": "letterbox", "resize_height": height, "resize_width": width}
    return Preprocessing.model_validate(described | {"interpolation": "bilinear", "anchor": anchor} | fields)


def in_frame(boxes: Sequence[Sequence[float]], preprocessing: Preprocessing, size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes xyxy in pixels of an original of `size` (width, height) as an engine says them: a letterbox written out by hand."""
    scale = min(preprocessing.width / size[0], preprocessing.height / size[1])
    inner = np.array([max(1, round(side * scale)) for side in size])
    frame = np.array([preprocessing.width, preprocessing.height])
    start = (frame - inner) // 2 if preprocessing.anchor == "centre" else np.zeros(2)
    corners = np.asarray(boxes, np.float64).reshape(-1, 2, 2) * inner / np.array(size) + start
    return (corners / frame).reshape(-1, 4).astype(np.float32)


def add_detector(
    repository: Path,
    boxes: NDArray[np.float32],
    scores: Sequence[float],
    classes: Sequence[int],
    *,
    name: str = "shapes",
    preprocessing: Preprocessing | None = None,
    content: bool = False,
    masks: bool = False,
    phrases: int = 0,
    **fields: Any,
) -> Entry:
    """Write `repository/name/1`, which finds `boxes` [N,4] (shares of the frame) in every image.

    With `content` the score of the first row is what the engine was told, height / 1000 + width / 1000000. With `phrases` the
    engine takes that many, a class is one of them, and its score is multiplied with the id of the phrase's first word / 100.
    """
    directory = repository / name / "1"
    directory.mkdir(parents=True)
    preprocessing = preprocessing or letterbox()
    count = len(boxes)
    constants: dict[str, NDArray[Any]] = {
        "all_boxes": boxes[None],
        "all_scores": np.array([scores], np.float32),
        "all_classes": np.array([classes], np.int64),
        "last": np.array([1]),
        "places": np.array([1, 2, 3]),
        "white": np.float32(765),
    }
    nodes = [
        helper.make_node("Slice", ["image", "origin", "corner", "places"], ["pixel"]),
        helper.make_node("Cast", ["pixel"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["levels", "places"], ["sum"], keepdims=0),
        helper.make_node("Equal", ["sum", "white"], ["is_white"]),
        helper.make_node("Where", ["is_white", "nan", "zero"], ["flat"]),
        helper.make_node("Reshape", ["flat", "boxy"], ["nothing"]),
        helper.make_node("Add", ["all_boxes", "nothing"], ["boxes"]),
        helper.make_node("Mul", ["levels", "zero"], ["dark"]),
        helper.make_node("ReduceSum", ["dark", "places"], ["zeros"], keepdims=0),
        helper.make_node("Reshape", ["zeros", "liney"], ["empty"]),
        helper.make_node("Cast", ["empty"], ["none"], to=TensorProto.INT64),
        helper.make_node("Add", ["all_classes", "none"], ["classes"]),
        helper.make_node("Add", ["all_scores", "empty"], ["told" if content else "scores"]),
    ]
    constants |= {
        "origin": np.zeros(3, np.int64),
        "corner": np.array([1, 1, 3]),
        "nan": np.float32(np.nan),
        "zero": np.float32(0),
        "boxy": np.array([-1, 1, 1]),
        "liney": np.array([-1, 1]),
    }
    inputs = [TensorSpec(name="image", dtype="uint8", shape=(-1, *FRAME, 3))]
    outputs = [
        TensorSpec(name="boxes", dtype="float32", shape=(-1, count, 4)),
        TensorSpec(name="scores", dtype="float32", shape=(-1, count)),
        TensorSpec(name="classes", dtype="int64", shape=(-1, count)),
    ]
    if content:
        inputs.append(TensorSpec(name="content", dtype="int32", shape=(-1, 2)))
        constants |= {"weights": np.array([1e-3, 1e-6], np.float32), "row": np.eye(1, count, dtype=np.float32)}
        nodes += [
            helper.make_node("Cast", ["content"], ["sides"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["sides", "weights"], ["parts"]),
            helper.make_node("ReduceSum", ["parts", "last"], ["said"], keepdims=1),
            helper.make_node("MatMul", ["said", "row"], ["first_row"]),
            helper.make_node("Add", ["told", "first_row"], ["scores"]),
        ]
    if phrases:
        inputs.append(TensorSpec(name="input_ids", dtype="int64", shape=(-1, phrases, LENGTH)))
        constants |= {"words": np.array(1), "wanted": np.array(classes), "hundred": np.float32(100)}
        nodes[-1] = helper.make_node("Add", ["all_scores", "empty"], ["sure"])
        nodes += [
            helper.make_node("Gather", ["input_ids", "words"], ["first_words"], axis=2),
            helper.make_node("Gather", ["first_words", "wanted"], ["said"], axis=1),
            helper.make_node("Cast", ["said"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["numbers", "hundred"], ["gains"]),
            helper.make_node("Mul", ["sure", "gains"], ["scores"]),
        ]
    if masks:
        outputs.append(TensorSpec(name="masks", dtype="float32", shape=(-1, count, MASKS.count)))
        constants["all_masks"] = np.broadcast_to(SPOT, (1, count, MASKS.count)).copy()
        nodes += [
            helper.make_node("Reshape", ["zeros", "boxy"], ["no_mask"]),
            helper.make_node("Add", ["all_masks", "no_mask"], ["masks"]),
        ]
    engine = directory / "model.onnx"
    engine.write_bytes(make_onnx(nodes, constants, inputs, outputs))
    detection = Detection(
        queries=count, classes=phrases or len(LABELS), score="sigmoid", content=content, masks=MASKS if masks else None
    )
    labels = () if phrases else LABELS
    described = {"role": "detect", "roles": ("detect",), "detection": detection, "labels": labels, "activation": None}
    if phrases:
        tokenizer = directory / "tokenizer.json"
        make_tokenizer().save(str(tokenizer))
        described["text"] = Text(tokenizer=artifact(tokenizer), length=LENGTH, phrases=phrases)
    described |= {"inputs": tuple(inputs), "outputs": tuple(outputs), "golden": (), "preprocessing": preprocessing}
    manifest = make_manifest(engine, name, **described | fields)
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return read_entry(directory)


def add_grounder(
    repository: Path,
    boxes: NDArray[np.float32],
    *,
    name: str = "phrases",
    preprocessing: Preprocessing | None = None,
    score: bool = False,
    too_long: str = "refuse",
) -> Entry:
    """Write `repository/name/1`: a phrase whose first word is number n of `WORDS` is answered with row n of `boxes`, by turns.

    With `score` that is the number of the phrase's tokens / 10.
    """
    directory = repository / name / "1"
    directory.mkdir(parents=True)
    tokenizer = directory / "tokenizer.json"
    make_tokenizer().save(str(tokenizer))
    nodes = [
        helper.make_node("Gather", ["input_ids", "second"], ["word"], axis=1),
        helper.make_node("Mod", ["word", "count"], ["row"]),
        helper.make_node("Gather", ["all_boxes", "row"], ["found"], axis=0),
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["levels", "zero"], ["dark"]),
        helper.make_node("ReduceSum", ["dark", "places"], ["zeros"], keepdims=0),
        helper.make_node("Reshape", ["zeros", "liney"], ["empty"]),
        helper.make_node("Add", ["found", "empty"], ["box"]),
        helper.make_node("Cast", ["attention_mask"], ["marks"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["marks", "last"], ["read"], keepdims=0),
    ]
    constants: dict[str, NDArray[Any]] = {
        "all_boxes": boxes,
        "second": np.array(1),
        "count": np.array(len(boxes)),
        "zero": np.float32(0),
        "places": np.array([1, 2, 3]),
        "liney": np.array([-1, 1]),
        "last": np.array([1]),
        "ten": np.float32(10),
    }
    ids = [TensorSpec(name=name, dtype="int64", shape=(-1, LENGTH)) for name in ("input_ids", "attention_mask")]
    inputs = [TensorSpec(name="image", dtype="uint8", shape=(-1, *FRAME, 3)), *ids]
    outputs = [TensorSpec(name="box", dtype="float32", shape=(-1, 4))]
    if score:
        outputs.append(TensorSpec(name="score", dtype="float32", shape=(-1,)))
        nodes.append(helper.make_node("Div", ["read", "ten"], ["score"]))
    engine = directory / "model.onnx"
    engine.write_bytes(make_onnx(nodes, constants, inputs, outputs))
    described = {"role": "ground", "roles": ("ground",), "labels": (), "activation": None, "golden": ()}
    described |= {"inputs": tuple(inputs), "outputs": tuple(outputs), "preprocessing": preprocessing or letterbox("centre")}
    text = Text.model_validate({"tokenizer": artifact(tokenizer), "length": LENGTH, "too_long": too_long})
    manifest = make_manifest(engine, name, **described, text=text)
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return read_entry(directory)


def make_tokenizer() -> Tokenizer:
    """Whole words of `WORDS`, in small letters, between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", WORDS.index("[SEP]")), ("[CLS]", WORDS.index("[CLS]")))
    return tokenizer


def make_onnx(
    nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], inputs: list[TensorSpec], outputs: list[TensorSpec]
) -> bytes:
    """A serialized ONNX model of these nodes."""
    described = [
        [
            helper.make_tensor_value_info(
                spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), ["batch", *spec.shape[1:]]
            )
            for spec in specs
        ]
        for specs in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "answers", *described, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
