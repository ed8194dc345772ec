"""A small but real tokenizer in a model repository: a token is the level of grey of an 8 x 8 block, of which there are 16."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.manifest import MANIFEST_FILE, Codebook, Entry, GoldenExample, Manifest, TensorSpec, read_entry
from tests.repository import make_images, make_manifest

NAME = "greys"
SIZE, BLOCK, CODES = 32, 8, 16
GRID = (SIZE // BLOCK, SIZE // BLOCK)
STEP = 256 // CODES
ROLES = ("tokenize", "detokenize")

IMAGE = TensorSpec(name="image", dtype="uint8", shape=(-1, SIZE, SIZE, 3))
TOKENS = TensorSpec(name="tokens", dtype="int32", shape=(-1, *GRID))
CODEBOOK = Codebook(id="c0de" * 16, count=1, size=CODES, channels=1, bits=4, grid=GRID)


def add_tokenizer(repository: Path, name: str = NAME, version: int = 1, **fields: object) -> dict[str, Entry]:
    """Write `repository/name.ROLE/version` for both roles; `fields` replace fields of both manifests."""
    entries = {}
    for role in ROLES:
        directory = repository / f"{name}.{role}" / str(version)
        (directory / "golden").mkdir(parents=True)
        engine = directory / "model.onnx"
        engine.write_bytes(make_engine(role))
        golden = _write_golden(directory, role)
        inputs, outputs = ((IMAGE,), (TOKENS,)) if role == "tokenize" else ((TOKENS,), (IMAGE,))
        answers = {"labels": (), "activation": None, "codebook": CODEBOOK, "inputs": inputs, "outputs": outputs}
        described = {"role": role, "roles": ROLES, "golden": golden} | answers | fields
        manifest: Manifest = make_manifest(engine, name, size=SIZE, **described)
        (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))
        entries[role] = read_entry(directory)
    return entries


def make_engine(role: str) -> bytes:
    """image uint8 [B,32,32,3] -> tokens int32 [B,4,4], or the way back: a serialized ONNX model."""
    nodes, constants = _tokenize() if role == "tokenize" else _detokenize()
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", *GRID])
    source, target = (image, tokens) if role == "tokenize" else (tokens, image)
    initializers = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, role, [source], [target], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def tokens_of(images: np.ndarray) -> np.ndarray:
    """What the engine gives for images uint8 [B,32,32,3], by numpy: int32 [B,4,4]."""
    blocks = images.reshape(-1, GRID[0], BLOCK, GRID[1], BLOCK, 3).astype(np.float32)
    return np.floor(blocks.mean((2, 4, 5)) / STEP).astype(np.int32)


def image_of(tokens: np.ndarray) -> np.ndarray:
    """What the engine gives for tokens int32 [B,4,4]: uint8 [B,32,32,3]."""
    levels = (tokens * STEP + STEP // 2).astype(np.uint8)
    return np.broadcast_to(levels.repeat(BLOCK, 1).repeat(BLOCK, 2)[..., None], (len(tokens), SIZE, SIZE, 3)).copy()


def _tokenize() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    shape = np.array([-1, GRID[0], BLOCK, GRID[1], BLOCK, 3])
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "shape"], ["blocks"]),
        helper.make_node("ReduceMean", ["blocks", "axes"], ["grey"], keepdims=0),
        helper.make_node("Mul", ["grey", "rate"], ["level"]),
        helper.make_node("Floor", ["level"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["tokens"], to=TensorProto.INT32),
    ]
    return nodes, {"shape": shape, "axes": np.array([2, 4, 5]), "rate": np.float32([1 / STEP])}


def _detokenize() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Mul", ["tokens", "step"], ["scaled"]),
        helper.make_node("Add", ["scaled", "half"], ["level"]),
        helper.make_node("Reshape", ["level", "apart"], ["blocks"]),
        helper.make_node("Tile", ["blocks", "times"], ["pixels"]),
        helper.make_node("Reshape", ["pixels", "frame"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["image"], to=TensorProto.UINT8),
    ]
    constants = {
        "step": np.int32([STEP]),
        "half": np.int32([STEP // 2]),
        "apart": np.array([-1, GRID[0], 1, GRID[1], 1, 1]),
        "times": np.array([1, 1, BLOCK, 1, BLOCK, 3]),
        "frame": np.array([-1, SIZE, SIZE, 3]),
    }
    return nodes, constants


def _write_golden(directory: Path, role: str) -> tuple[GoldenExample, ...]:
    tokens = tokens_of(make_images(1, size=SIZE))
    np.savez(
        directory / "golden/inputs.npz", **({"image": make_images(1, size=SIZE)} if role == "tokenize" else {"tokens": tokens})
    )
    np.savez(directory / "golden/outputs.npz", **({"tokens": tokens} if role == "tokenize" else {"image": image_of(tokens)}))
    return (GoldenExample(inputs="golden/inputs.npz", outputs="golden/outputs.npz", tolerance=0.5),)
