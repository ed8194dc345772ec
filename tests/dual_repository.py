"""A small but real dual encoder in a model repository: what its vectors are is known.

An image becomes its mean colour at unit length, a text the sum of its words' colours at unit length.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.manifest import MANIFEST_FILE, Embedding, Entry, TensorSpec, Text, read_entry
from export.config import CONFIG_FILE, render_config
from tests.detector_repository import make_onnx
from tests.repository import artifact, make_manifest

SIZE = 16
LENGTH = 8
SCALE = 20.0
COLOURS: dict[str, tuple[float, float, float]] = {
    "[PAD]": (0, 0, 0),
    "[UNK]": (0.1, 0.1, 0.1),
    "[CLS]": (0, 0, 0),
    "[SEP]": (0, 0, 0),
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (0.7, 0.7, 0),
    "dark": (0.2, 0, 0.2),
    "a": (0, 0.05, 0),
}
TABLE = np.array([*COLOURS.values()], np.float32)


def add_dual_encoder(repository: Path, name: str = "colour-clip", **embedding: Any) -> tuple[Entry, Entry]:
    """Write `repository/name.image/1` and `repository/name.text/1`; `embedding` replaces what the vectors mean."""
    image = TensorSpec(name="image", dtype="uint8", shape=(-1, SIZE, SIZE, 3))
    ids = TensorSpec(name="input_ids", dtype="int64", shape=(-1, LENGTH))
    vector = TensorSpec(name="embedding", dtype="float32", shape=(-1, 3))
    meant = Embedding.model_validate({"dimensions": 3, "scale": SCALE} | embedding)
    seen = [
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["levels", "part"], ["shares"]),
        helper.make_node("ReduceMean", ["shares", "places"], ["raw"], keepdims=0),
    ]
    read = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("ReduceSum", ["words", "positions"], ["raw"], keepdims=0),
    ]
    constants: dict[str, NDArray[Any]] = {"last": np.array([1]), "least": np.float32(1e-6)}
    unit = [
        helper.make_node("ReduceL2", ["raw", "last"], ["length"], keepdims=1),
        helper.make_node("Max", ["length", "least"], ["divisor"]),
        helper.make_node("Div", ["raw", "divisor"], ["embedding"]),
    ]
    entries = []
    for role, spec, nodes, more in (
        ("image", image, seen, {"part": np.float32(1 / 255), "places": np.array([1, 2])}),
        ("text", ids, read, {"table": TABLE, "positions": np.array([1])}),
    ):
        directory = repository / f"{name}.{role}" / "1"
        directory.mkdir(parents=True)
        engine = directory / "model.onnx"
        engine.write_bytes(make_onnx([*nodes, *unit], constants | more, [spec], [vector]))
        described = {"role": role, "roles": ("image", "text"), "labels": (), "activation": None, "golden": (), "embedding": meant}
        if role == "text":
            file = directory / "tokenizer.json"
            make_words().save(str(file))
            described["text"] = Text.model_validate(
                {"tokenizer": artifact(file), "length": LENGTH, "too_long": "truncate", "clean": "lower"}
            )
        manifest = make_manifest(engine, name, size=SIZE, inputs=(spec,), outputs=(vector,), **described)
        (directory / MANIFEST_FILE).write_text(manifest.model_dump_json())
        (directory.parent / CONFIG_FILE).write_text(render_config(manifest))
        entries.append(read_entry(directory))
    return entries[0], entries[1]


def text_vector(text: str) -> NDArray[np.float64]:
    """What the engine gives for a text of known words, float64 [3]."""
    words = text.lower().split()[: LENGTH - 2]
    total = np.array([COLOURS.get(word, COLOURS["[UNK]"]) for word in words]).sum(0)
    return np.asarray(total / np.linalg.norm(total))


def make_words() -> Tokenizer:
    """Whole words of `COLOURS` between [CLS] and [SEP]."""
    known = [*COLOURS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", known.index("[SEP]")), ("[CLS]", known.index("[CLS]")))
    return tokenizer
