"""A small but real chat model: three ONNX engines that count. The answer goes on from the prompt's last token, one more each time;
an image is read as the tokens of its merged patches' mean levels.

The decoder adds 1/8 to the logit of a token for each time that the cache has it, so that a lost or a foreign cache shows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from app.manifest import MANIFEST_FILE as MANIFEST
from app.manifest import Entry, Generation, Preprocessing, TensorSpec, read_entry
from tests.repository import artifact, make_manifest

NAME = "counter"
ROLES = ("vision", "embed", "decoder")
SPECIAL = ("<|end|>", "<|image|>")
VOCABULARY = 258  # the bytes, and the special tokens behind them
END, IMAGE = 256, 257
ROUND = 200
PATCH, MERGE, FRAMES = 2, 2, 1
CHANNELS = 3 * FRAMES * PATCH**2
HEAD = 4
MAX_LENGTH = 64
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}"
)


def add_chat(repository: Path, name: str = NAME, version: int = 1, **generation: Any) -> tuple[Entry, ...]:
    """Write `repository/NAME.ROLE/VERSION` of the three roles; `generation` replaces fields of the record of that name."""
    return tuple(_add(repository, name, version, role, generation) for role in ROLES)


def poison_token(entries: tuple[Entry, ...], token: int) -> None:
    """Let the model fail when it is to go on from `token`: the row of its table is far outside of it."""
    (entry,) = (each for each in entries if each.manifest.role == "embed")
    inputs, outputs, *_ = _GRAPHS["embed"]
    nodes = [
        _NODE("Equal", ["input_ids", "poison"], ["poisonous"]),
        _NODE("Where", ["poisonous", "outside", "input_ids"], ["rows"]),
        _NODE("Gather", ["table", "rows"], ["inputs_embeds"]),
    ]
    table = {"poison": np.array(token), "outside": np.array(10**6), "table": np.eye(VOCABULARY, dtype=np.float32)}
    entry.engine_file.write_bytes(_serialize("embed", inputs, outputs, nodes, table))
    engine = entry.manifest.engine.model_copy(update=artifact(entry.engine_file).model_dump())
    manifest = entry.manifest.model_copy(update={"engine": engine})
    (entry.path / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")


def let_say(entries: tuple[Entry, ...], letter: str, text: str) -> None:
    """Write `text` wherever the model says `letter`, an ASCII character."""
    for entry in entries:
        file = entry.path / "tokenizer.json"
        document = json.loads(file.read_text())
        vocabulary = document["model"]["vocab"]
        vocabulary["".join(_alphabet()[byte] for byte in text.encode())] = vocabulary.pop(letter)
        file.write_text(json.dumps(document))
        assert entry.manifest.generation is not None
        generation = entry.manifest.generation.model_copy(update={"tokenizer": artifact(file)})
        (entry.path / MANIFEST).write_text(entry.manifest.model_copy(update={"generation": generation}).model_dump_json())


def make_tokenizer() -> Tokenizer:
    """A token for every byte, in their order, and the special tokens."""
    alphabet = _alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _alphabet() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in a byte-level BPE: themselves where they can be seen."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _add(repository: Path, name: str, version: int, role: str, generation: Mapping[str, Any]) -> Entry:
    directory = repository / f"{name}.{role}" / str(version)
    directory.mkdir(parents=True)
    engine, tokenizer = directory / "model.onnx", directory / "tokenizer.json"
    inputs, outputs, nodes, constants = _GRAPHS[role]
    engine.write_bytes(_serialize(role, inputs, outputs, nodes, constants))
    make_tokenizer().save(str(tokenizer))
    fields = {
        "tokenizer": artifact(tokenizer),
        "chat_template": TEMPLATE,
        "max_length": MAX_LENGTH,
        "vocabulary": VOCABULARY,
        "image_token_id": IMAGE,
        "end_token_ids": (END,),
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGE,
        "window_size": 2 * PATCH * MERGE,
        "vision_head_dim": HEAD,
        "vision_rope_theta": 10_000.0,
        "min_pixels": (PATCH * MERGE) ** 2,
        "max_pixels": 32 * (PATCH * MERGE) ** 2,
    }
    manifest = make_manifest(
        engine,
        name,
        role=role,
        roles=ROLES,
        labels=(),
        activation=None,
        golden=(),
        inputs=inputs,
        outputs=outputs,
        preprocessing=Preprocessing(
            height=PATCH * MERGE,
            width=PATCH * MERGE,
            policy="native",
            resize_height=PATCH * MERGE,
            resize_width=PATCH * MERGE,
            interpolation="bicubic",
        ),
        generation=Generation.model_validate(fields | dict(generation)),
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    return read_entry(directory)


def _spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})


def _serialize(
    role: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, NDArray[Any]],
) -> bytes:
    sides = (
        [
            helper.make_tensor_value_info(
                spec.name,
                getattr(TensorProto, {"float32": "FLOAT"}.get(spec.dtype, spec.dtype.upper())),
                [f"{spec.name}_{axis}" if size < 0 else size for axis, size in enumerate(spec.shape)],
            )
            for spec in side
        ]
        for side in (inputs, outputs)
    )
    initialisers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, role, *sides, initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


_NODE = helper.make_node
# 10 for the token one further; the tokens below ROUND go round for ever, those above end.
_SHIFT = 10 * np.roll(np.eye(VOCABULARY, dtype=np.float32), 1, axis=1)
_SHIFT[ROUND - 1] = 10 * np.eye(VOCABULARY, dtype=np.float32)[0]

_GRAPHS: dict[str, Any] = {
    "vision": (
        (
            _spec("patches", "uint8", -1, CHANNELS),
            _spec("cos", "float32", -1, HEAD),
            _spec("sin", "float32", -1, HEAD),
            _spec("windows", "int64", -1, -1),
            _spec("lengths", "int64", -1),
            _spec("places", "int64", -1),
        ),
        (_spec("image_features", "float32", -1, VOCABULARY),),
        [
            _NODE("Cast", ["patches"], ["pixels"], to=TensorProto.FLOAT),
            _NODE("Reshape", ["pixels", "merged"], ["groups"]),
            _NODE("ReduceMean", ["groups", "last"], ["levels"], keepdims=0),
            _NODE("Cast", ["levels"], ["tokens"], to=TensorProto.INT64),
            _NODE("OneHot", ["tokens", "depth", "values"], ["image_features"]),
        ],
        {
            "merged": np.array([-1, CHANNELS * MERGE**2]),
            "last": np.array([1]),
            "depth": np.array(VOCABULARY),
            "values": np.array([0, 1], np.float32),
        },
    ),
    "embed": (
        (_spec("input_ids", "int64", -1, -1),),
        (_spec("inputs_embeds", "float32", -1, -1, VOCABULARY),),
        [_NODE("OneHot", ["input_ids", "depth", "values"], ["inputs_embeds"])],
        {"depth": np.array(VOCABULARY), "values": np.array([0, 1], np.float32)},
    ),
    "decoder": (
        (
            _spec("inputs_embeds", "float32", -1, -1, VOCABULARY),
            _spec("position_ids", "int64", -1, 3, -1),
            _spec("past.0.key", "float32", -1, 1, -1, VOCABULARY),
            _spec("past.0.value", "float32", -1, 1, -1, VOCABULARY),
        ),
        (
            _spec("logits", "float32", -1, VOCABULARY),
            _spec("present.0.key", "float32", -1, 1, -1, VOCABULARY),
            _spec("present.0.value", "float32", -1, 1, -1, VOCABULARY),
        ),
        [
            _NODE("Unsqueeze", ["inputs_embeds", "one"], ["new"]),
            _NODE("Concat", ["past.0.key", "new"], ["present.0.key"], axis=2),
            _NODE("Concat", ["past.0.value", "new"], ["present.0.value"], axis=2),
            _NODE("Gather", ["inputs_embeds", "minus_one"], ["last"], axis=1),
            _NODE("MatMul", ["last", "shift"], ["next"]),
            _NODE("ReduceSum", ["present.0.key", "middle"], ["counts"], keepdims=0),
            _NODE("Mul", ["counts", "little"], ["memory"]),
            _NODE("Add", ["next", "memory"], ["logits"]),
        ],
        {
            "one": np.array([1]),
            "minus_one": np.array(-1),
            "middle": np.array([1, 2]),
            "shift": _SHIFT,
            "little": np.array(0.125, np.float32),
        },
    ),
}
