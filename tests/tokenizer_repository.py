"""A small but real tokenizer in a model repository: a token is the level of grey of an 8 x 8 block, of which there are 16.

With a second codebook its token is the 16th of that level, so that the two together keep the grey exactly.
"""

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
CODEBOOK = Codebook(id="c0de" * 16, count=1, size=CODES, channels=1, bits=4, grid=GRID)


def add_tokenizer(
    repository: Path,
    name: str = NAME,
    version: int = 1,
    *,
    codebooks: int = 1,
    roles: tuple[str, ...] = ROLES,
    **fields: object,
) -> dict[str, Entry]:
    """Write `repository/name.ROLE/version` for each of `roles` (`repository/name/version` for one alone), with 1 or 2 codebooks.

    `fields` replace fields of every manifest.
    """
    codebook = CODEBOOK.model_copy(update={"count": codebooks})
    tokens = TensorSpec(name="tokens", dtype="int32", shape=(-1, *grid_of(codebooks)))
    entries = {}
    for role in roles:
        directory = repository / (f"{name}.{role}" if len(roles) > 1 else name) / str(version)
        (directory / "golden").mkdir(parents=True)
        engine = directory / "model.onnx"
        engine.write_bytes(make_engine(role, codebooks))
        golden = _write_golden(directory, role, codebooks)
        inputs, outputs = ((IMAGE,), (tokens,)) if role == "tokenize" else ((tokens,), (IMAGE,))
        answers = {"labels": (), "activation": None, "codebook": codebook, "inputs": inputs, "outputs": outputs}
        described = {"role": role, "roles": roles, "golden": golden} | answers | fields
        manifest: Manifest = make_manifest(engine, name, size=SIZE, **described)
        (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))
        entries[role] = read_entry(directory)
    return entries


def grid_of(codebooks: int) -> tuple[int, ...]:
    """The shape of one image's tokens."""
    return GRID if codebooks == 1 else (codebooks, *GRID)


def make_engine(role: str, codebooks: int = 1) -> bytes:
    """image uint8 [B,32,32,3] -> tokens int32 [B,4,4] or [B,2,4,4], or the way back: a serialized ONNX model."""
    nodes, constants = _tokenize(codebooks) if role == "tokenize" else _detokenize(codebooks)
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", *grid_of(codebooks)])
    source, target = (image, tokens) if role == "tokenize" else (tokens, image)
    initializers = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, role, [source], [target], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def tokens_of(images: np.ndarray, codebooks: int = 1) -> np.ndarray:
    """What the engine gives for images uint8 [B,32,32,3], by numpy: int32 [B,4,4] or [B,2,4,4]."""
    blocks = images.reshape(-1, GRID[0], BLOCK, GRID[1], BLOCK, 3).astype(np.float32)
    greys = np.floor(blocks.mean((2, 4, 5))).astype(np.int32)
    return greys // STEP if codebooks == 1 else np.stack([greys // STEP, greys % STEP], 1)


def image_of(tokens: np.ndarray) -> np.ndarray:
    """What the engine gives for tokens int32 [B,4,4] or [B,2,4,4]: uint8 [B,32,32,3]."""
    levels = tokens * STEP + STEP // 2 if tokens.ndim == 3 else tokens[:, 0] * STEP + tokens[:, 1]
    levels = levels.astype(np.uint8)
    return np.broadcast_to(levels.repeat(BLOCK, 1).repeat(BLOCK, 2)[..., None], (len(tokens), SIZE, SIZE, 3)).copy()


def _tokenize(codebooks: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "shape"], ["blocks"]),
        helper.make_node("ReduceMean", ["blocks", "axes"], ["mean"], keepdims=0),
        helper.make_node("Floor", ["mean"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["grey"], to=TensorProto.INT32),
        helper.make_node("Div", ["grey", "step"], ["coarse" if codebooks == 2 else "tokens"]),
    ]
    constants = {"shape": np.array([-1, GRID[0], BLOCK, GRID[1], BLOCK, 3]), "axes": np.array([2, 4, 5]), "step": np.int32([STEP])}
    if codebooks == 2:
        nodes += [
            helper.make_node("Mod", ["grey", "step"], ["fine"]),
            helper.make_node("Unsqueeze", ["coarse", "book"], ["first"]),
            helper.make_node("Unsqueeze", ["fine", "book"], ["second"]),
            helper.make_node("Concat", ["first", "second"], ["tokens"], axis=1),
        ]
        constants["book"] = np.array([1])
    return nodes, constants


def _detokenize(codebooks: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    constants = {
        "apart": np.array([-1, GRID[0], 1, GRID[1], 1, 1]),
        "times": np.array([1, 1, BLOCK, 1, BLOCK, 3]),
        "frame": np.array([-1, SIZE, SIZE, 3]),
    }
    if codebooks == 1:
        nodes = [helper.make_node("Mul", ["tokens", "step"], ["scaled"]), helper.make_node("Add", ["scaled", "half"], ["level"])]
        constants |= {"step": np.int32([STEP]), "half": np.int32([STEP // 2])}
    else:
        nodes = [
            helper.make_node("Mul", ["tokens", "parts"], ["scaled"]),
            helper.make_node("ReduceSum", ["scaled", "book"], ["level"], keepdims=0),
        ]
        constants |= {"parts": np.int32([STEP, 1]).reshape(2, 1, 1), "book": np.array([1])}
    nodes += [
        helper.make_node("Reshape", ["level", "apart"], ["blocks"]),
        helper.make_node("Tile", ["blocks", "times"], ["pixels"]),
        helper.make_node("Reshape", ["pixels", "frame"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["image"], to=TensorProto.UINT8),
    ]
    return nodes, constants


def _write_golden(directory: Path, role: str, codebooks: int) -> tuple[GoldenExample, ...]:
    images = make_images(1, size=SIZE)
    tokens = tokens_of(images, codebooks)
    given, answer = (
        ({"image": images}, {"tokens": tokens}) if role == "tokenize" else ({"tokens": tokens}, {"image": image_of(tokens)})
    )
    np.savez(directory / "golden/inputs.npz", **given)
    np.savez(directory / "golden/outputs.npz", **answer)
    return (GoldenExample(inputs="golden/inputs.npz", outputs="golden/outputs.npz", tolerance=0.5),)
