"""A small but real model repository: an ONNX classifier of the engine contract that names the colour of an image."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from app.manifest import (
    MANIFEST_FILE,
    ArtifactFile,
    DType,
    EngineSpec,
    Entry,
    GoldenExample,
    Manifest,
    Preprocessing,
    Source,
    TensorSpec,
    read_entry,
)

LABELS = ("red", "green", "blue", "cyan", "magenta", "yellow")
NAME = "colours"
SIZE = 16
MAX_BATCH = 8
POISON = 255  # a poisoned engine fails at run time on an image whose first pixel has this much red

_DIRECTIONS = np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2], [-2, 1, 1], [1, -2, 1], [1, 1, -2]], np.float32).T

CONFIG = """\
name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch}
input [ {inputs} ]
output [ {outputs} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ max_queue_delay_microseconds: {linger} default_queue_policy {{ max_queue_size: {queue} }} }}
version_policy {{ latest {{ num_versions: 2 }} }}
parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
"""


def make_repository(root: Path, *names: str, **options: Any) -> Path:
    """Write one entry, version 1, for each name (by default `colours`) under `root`; `options` are those of `add_entry`."""
    for name in names or (NAME,):
        add_entry(root, name, **options)
    return root


def add_entry(
    repository: Path,
    name: str = NAME,
    version: int = 1,
    *,
    size: int = SIZE,
    max_batch: int = MAX_BATCH,
    queue: int = 64,
    delay: int = 0,
    poison: bool = False,
    linger: int = 0,
    backend: str = "onnxruntime",
    **fields: Any,
) -> Entry:
    """Write `repository/name/version` and `config.pbtxt`. `fields` replace fields of the manifest.

    `queue`, `linger` (microseconds that a call waits for others to share its batch) and `backend` are for Triton.

    Versions answer differently (see `reference`). `delay` is the side of a matrix that is multiplied ten times with itself
    before each answer, to make the engine slow; `poison` adds an input on which it fails (see `POISON`).
    """
    directory = repository / name / str(version)
    (directory / "golden").mkdir(parents=True)
    engine = directory / "model.onnx"
    engine.write_bytes(make_engine(version, size=size, delay=delay, poison=poison))
    _write_golden(directory / "golden", version, size)
    return _describe(directory, make_manifest(engine, name, size=size, max_batch=max_batch, **fields), queue, linger, backend)


def add_echo(repository: Path, name: str = "echo") -> Entry:
    """Write `repository/name/1`: for each dtype of the contract an input `DTYPE` [B,2] and the same as output `DTYPE_out`."""
    directory = repository / name / "1"
    directory.mkdir(parents=True)
    dtypes = get_args(DType)
    names = [(dtype, f"{dtype}_out") for dtype in dtypes]
    graph = helper.make_graph(
        [helper.make_node("Identity", [source], [target]) for source, target in names],
        name,
        *([helper.make_tensor_value_info(pair[side], _onnx_type(pair[0]), ["batch", 2]) for pair in names] for side in (0, 1)),
    )
    engine = directory / "model.onnx"
    engine.write_bytes(_serialized(graph))
    inputs, outputs = (tuple(TensorSpec(name=pair[side], dtype=pair[0], shape=(-1, 2)) for pair in names) for side in (0, 1))
    return _describe(directory, make_manifest(engine, name, inputs=inputs, outputs=outputs, labels=(), golden=()), queue=64)


def make_manifest(engine: Path, model: str = NAME, *, size: int = SIZE, max_batch: int = MAX_BATCH, **fields: Any) -> Manifest:
    """The manifest of the engine file `engine`; `fields` replace any of its fields."""
    defaults: dict[str, Any] = {
        "model": model,
        "role": "classify",
        "roles": ("classify",),
        "build": "20260101-000000",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "engine": EngineSpec(kind="onnx", opset=20, ir_version=10, max_batch=max_batch, **artifact(engine).model_dump()),
        "inputs": (TensorSpec(name="image", dtype="uint8", shape=(-1, size, size, 3)),),
        "outputs": (TensorSpec(name="probabilities", dtype="float32", shape=(-1, len(LABELS))),),
        "preprocessing": Preprocessing(
            height=size, width=size, policy="stretch", resize_height=size, resize_width=size, interpolation="bilinear"
        ),
        "labels": LABELS,
        "activation": "softmax",
        "source": Source(library="onnx", architecture="mean-colour", weights="embedded"),
        "precision": "fp32",
        "parameters": _DIRECTIONS.size,
        "golden": (GoldenExample(image="golden/0.png", outputs="golden/0.npz", tolerance=1e-5),),
    }
    return Manifest.model_validate(defaults | fields)


def artifact(file: Path) -> ArtifactFile:
    """The record of a file that lies in its version directory."""
    content = file.read_bytes()
    return ArtifactFile(file=file.name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def make_engine(version: int = 1, *, size: int = SIZE, delay: int = 0, poison: bool = False) -> bytes:
    """image uint8 [B,size,size,3] -> probabilities float32 [B,6]: softmax(mean colour @ directions); a serialized ONNX model."""
    constants = {"level": np.float32(1 / 255), "axes": np.array([1, 2]), "weights": _weights(version)}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "level"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
    ]
    logits = "logits"
    for add, wanted in ((_add_poison, poison), (_add_delay, delay)):
        if wanted:
            logits = add(nodes, constants, logits, int(wanted))
    nodes.append(helper.make_node("Softmax", [logits], ["probabilities"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", size, size, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return _serialized(graph)


def reference(images: NDArray[np.uint8], version: int = 1) -> NDArray[np.float32]:
    """What the engine of `version` answers to images uint8 [B,H,W,3]: probabilities float32 [B,6], by numpy."""
    logits = (images.astype(np.float32) / 255).mean(axis=(1, 2)) @ _weights(version)
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def make_images(count: int, *, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Images uint8 [count,size,size,3], each of another mean colour; none is poisonous."""
    random = np.random.default_rng(seed)
    base = random.integers(20, 200, (count, 1, 1, 3))
    return (base + random.integers(0, 40, (count, size, size, 3))).astype(np.uint8)


def _weights(version: int) -> NDArray[np.float32]:
    """[3,6]; a later version is surer of itself."""
    return _DIRECTIONS * np.float32(1 + version)


def _add_poison(nodes: list[onnx.NodeProto], constants: dict[str, Any], logits: str, _: int) -> str:
    """Look the first pixel's red up in a table that has no row `POISON`: the engine fails there at run time only."""
    constants |= {
        "origin": np.zeros(3, np.int64),
        "corner": np.ones(3, np.int64),
        "corner_axes": np.array([1, 2, 3]),
        "table": np.zeros(POISON, np.float32),
        "column": np.array([-1, 1]),
    }
    nodes += [
        helper.make_node("Slice", ["image", "origin", "corner", "corner_axes"], ["pixel"]),
        helper.make_node("Cast", ["pixel"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["looked_up"]),
        helper.make_node("Reshape", ["looked_up", "column"], ["zero"]),
        helper.make_node("Add", [logits, "zero"], ["poisoned"]),
    ]
    return "poisoned"


def _add_delay(nodes: list[onnx.NodeProto], constants: dict[str, Any], logits: str, side: int) -> str:
    """Add zero, the outcome of ten products of [side,side] matrices that depend on the input, once per row."""
    constants |= {
        "tile": np.zeros((1, side, side), np.float32),
        "first": np.array([0]),
        "row": np.array([-1, 1, 1]),
        "all": np.array([1, 2]),
        "rest_column": np.array([-1, 1]),
    }
    nodes += [
        helper.make_node("Gather", [logits, "first"], ["lead"], axis=1),
        helper.make_node("Reshape", ["lead", "row"], ["lead_row"]),
        helper.make_node("Add", ["tile", "lead_row"], ["work0"]),
    ]
    nodes += [helper.make_node("MatMul", ["tile", f"work{i}"], [f"work{i + 1}"]) for i in range(10)]
    nodes += [
        helper.make_node("ReduceMean", ["work10", "all"], ["rest"], keepdims=0),
        helper.make_node("Reshape", ["rest", "rest_column"], ["rest_row"]),
        helper.make_node("Add", [logits, "rest_row"], ["delayed"]),
    ]
    return "delayed"


def _serialized(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _onnx_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _describe(directory: Path, manifest: Manifest, queue: int, linger: int = 0, backend: str = "onnxruntime") -> Entry:
    """Write what lies beside the engine: the manifest, and Triton's configuration of the model."""
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))
    config = CONFIG.format(
        name=directory.parent.name,
        max_batch=manifest.engine.max_batch,
        queue=queue,
        linger=linger,
        backend=backend,
        inputs=", ".join(map(_tensor_config, manifest.inputs)),
        outputs=", ".join(map(_tensor_config, manifest.outputs)),
    )
    (directory.parent / "config.pbtxt").write_text(config)
    return read_entry(directory)


def _tensor_config(spec: TensorSpec) -> str:
    kind = spec.dtype.upper().replace("FLOAT", "FP")
    return f'{{ name: "{spec.name}" data_type: TYPE_{kind} dims: {list(spec.shape[1:])} }}'


def _write_golden(directory: Path, version: int, size: int) -> None:
    image = make_images(1, size=size)
    Image.fromarray(image[0]).save(directory / "0.png")
    np.savez(directory / "0.npz", probabilities=reference(image, version))
