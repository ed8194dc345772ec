"""Every grounding network, from the paper's network to the engine: the boxes of torch, for images and phrases."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from app.backends.onnxruntime import OnnxRuntimeBackend
from app.golden import check_golden
from app.manifest import MANIFEST_FILE, ManifestError, read_entry
from export import architectures, pipeline
from export.bert_tokenizer import train_tokenizer
from export.fuse_grounder import fuse_grounder
from export.grounder import corners
from export.informative import sample_images
from export.load import load
from export.phrases import grounding_phrases
from export.spec import Engine, ExportError, LoadedGrounder, image_tensor
from export.to_onnx import to_onnx
from export.verify_grounder import TOLERANCES, distance, known_phrases
from tests.export.grounders import GROUNDERS, GrounderFamily
from tests.repository import artifact

NARROW = [pytest.param((family, False), id=name) for name, family in GROUNDERS.items()]
PUBLISHED = [
    pytest.param((family, True), id=f"{name}-published", marks=pytest.mark.conformance) for name, family in GROUNDERS.items()
]
ROWS = 8
Inputs = dict[str, NDArray[Any]]


@dataclass
class Exported:
    """One network and its engine."""

    family: GrounderFamily
    loaded: LoadedGrounder
    engine: Engine

    @cached_property
    def inputs(self) -> Inputs:
        """Eight images, each with a phrase of its own."""
        phrases = known_phrases(self.loaded.vocabulary, self.loaded.network.length, ROWS)
        ids, mask = self.loaded.vocabulary.rows(phrases, self.loaded.network.length)
        images = sample_images(self.loaded.preprocessing, ROWS, seed=1).numpy()
        return {"image": images, "input_ids": ids, "attention_mask": mask}

    def by_torch(self, inputs: Inputs) -> NDArray[np.float32]:
        """Boxes [B,4] xyxy, each on its own."""
        images = image_tensor(torch.from_numpy(inputs["image"]), self.loaded.preprocessing)
        ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
        with torch.inference_mode():
            rows = [self.loaded.network(images[[row]], ids[[row]], mask[[row]]) for row in range(len(images))]
            return corners(torch.cat(rows)).numpy()

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        session = onnxruntime.InferenceSession(str(self.engine.path), options, providers=["CPUExecutionProvider"])
        boxes: NDArray[np.float32] = session.run(None, inputs)[0]
        return boxes


@pytest.fixture(scope="module", params=NARROW + PUBLISHED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    family, published = request.param
    directory: Path = tmp_path_factory.mktemp(family.name)
    loaded = load(family.request(directory, published=published))
    assert isinstance(loaded, LoadedGrounder)
    engine = to_onnx(fuse_grounder(loaded), directory / "model.onnx", "fp32")
    yield Exported(family, loaded, engine)
    engine.path.unlink()


def test_every_grounding_network_is_here() -> None:
    files = {name: architectures.find(name) for name in architectures.names()}
    assert {name for name, file in files.items() if architectures.task_of(file) == "ground"} == set(GROUNDERS)
    assert all(family.figures.keys() == files[name].VARIANTS.keys() for name, family in GROUNDERS.items())


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name, family in GROUNDERS.items() for variant in family.figures])
def test_parameters_and_work_are_those_published(name: str, variant: str) -> None:
    with torch.device("meta"):
        network = architectures.find(name).make(variant)
        words, unseen = torch.zeros(1, 20, network.text_proj.in_features), torch.zeros(1, 1, 1, 20)
        with FlopCounterMode(display=False) as counter:
            found = network.visual_branch(torch.zeros(1, 3, 640, 640), network.reg_token, network.text_proj(words), unseen)
            assert network.prediction_head(found).shape == (1, 4)
    text = sum(parameter.numel() for parameter in network.language_branch.parameters()) / 1e6
    rest = sum(parameter.numel() for parameter in network.parameters()) / 1e6 - text
    work = counter.get_total_flops() / 2e9
    millions, text_millions, billions = GROUNDERS[name].figures[variant]
    assert (rest, text) == pytest.approx((millions, text_millions), abs=0.006)
    assert work == pytest.approx(billions, rel=0.005)


def test_parameters_have_the_published_names() -> None:
    with torch.device("meta"):
        keys = architectures.find("transvg_pp").make("tiny").state_dict().keys()
    linear = ("weight", "bias")
    block = ("norm1", "attn.q_in", "attn.k_in", "attn.v_in", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    bert = "language_branch.language_backbone"
    expected = {
        *("reg_token", "visual_branch.pos_embed", *(f"{bert}.embeddings.word_embeddings.weight",)),
        *(f"{bert}.encoder.layer.11.attention.self.query.{kind}" for kind in linear),
        *(f"{bert}.{part}.dense.{kind}" for part in ("encoder.layer.0.intermediate", "pooler") for kind in linear),
        *(f"{part}.{kind}" for part in ("text_proj", "visual_branch.patch_embed.proj", "visual_branch.norm") for kind in linear),
        *(f"visual_branch.blocks.{index}.{part}.{kind}" for index in range(12) for part in block for kind in linear),
        *(
            f"visual_branch.blocks.{index}.lang_modulation.{part}.{kind}"
            for index in (2, 5, 8, 11)
            for part in ("q_in", "k_in", "v_in", "proj")
            for kind in linear
        ),
        *(f"prediction_head.layers.{index}.{kind}" for index in range(3) for kind in linear),
    }
    assert expected <= keys
    assert {key for key in keys if not key.startswith(bert)} == {key for key in expected if not key.startswith(bert)}


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_boxes_are_those_of_torch(exported: Exported, batch: int) -> None:
    inputs = {name: rows[:batch] for name, rows in exported.inputs.items()}
    assert distance(exported.run(inputs), exported.by_torch(inputs)).max() <= TOLERANCES["fp32"].engine


def test_boxes_depend_on_image_and_phrase(exported: Exported) -> None:
    """By much more than what the comparison above lets pass."""
    boxes = exported.by_torch(exported.inputs)
    for name in ("image", "input_ids"):
        others = dict(exported.inputs) | {name: np.roll(exported.inputs[name], 1, axis=0)}
        if name == "input_ids":
            others["attention_mask"] = np.roll(exported.inputs["attention_mask"], 1, axis=0)
        assert np.median(distance(boxes, exported.by_torch(others))) > 20 * TOLERANCES["fp32"].engine, name
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides > 0).all()
    assert (sides < 1).all()


def test_padding_is_not_looked_at(exported: Exported) -> None:
    inputs = exported.inputs
    other = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)
    assert (other != inputs["input_ids"]).any()
    np.testing.assert_allclose(exported.run(inputs | {"input_ids": other}), exported.run(inputs), atol=1e-5)
    seen = inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}
    assert np.abs(exported.run(seen) - exported.run(inputs)).max() > 0.01


def test_the_engine_keeps_the_contract(exported: Exported) -> None:
    preprocessing, length = exported.loaded.preprocessing, exported.loaded.network.length
    kinds = onnx.TensorProto
    words = [(name, kinds.INT64, ["batch", length]) for name in ("input_ids", "attention_mask")]
    graph = onnx.load(exported.engine.path).graph
    assert [describe(value) for value in graph.input] == [
        ("image", kinds.UINT8, ["batch", preprocessing.height, preprocessing.width, 3]),
        *words,
    ]
    assert [describe(value) for value in graph.output] == [("box", kinds.FLOAT, ["batch", 4])]
    engine = exported.engine
    assert (engine.opset, engine.ir_version, engine.external_data) == (20, 10, ())
    assert engine.tensorrt is not None
    assert engine.tensorrt.convertible, engine.tensorrt.findings
    assert not {"GatherND", "If", "Loop", "NonZero", "Einsum"} & {node.op_type for node in graph.node}
    assert engine.macs


def test_in_half_precision_boxes_stay_close_and_float32(exported: Exported, tmp_path: Path) -> None:
    half = replace(exported, engine=to_onnx(fuse_grounder(exported.loaded), tmp_path / "half.onnx", "fp16"))
    graph = onnx.load(half.engine.path).graph
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in graph.initializer}
    boxes = half.run(exported.inputs)
    assert boxes.dtype == np.float32
    assert distance(boxes, exported.by_torch(exported.inputs)).max() <= TOLERANCES["fp16"].engine


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow network's version directory, through the whole line."""
    request = GROUNDERS["transvg_pp"].request(tmp_path_factory.mktemp("published"))
    return pipeline.export(request, lambda stage: None).path


def test_what_is_published_says_what_it_reads(published: Path) -> None:
    entry = read_entry(published)
    manifest = entry.manifest
    assert (manifest.role, manifest.entry_name, manifest.labels, manifest.activation) == ("ground", "transvg-pp", (), None)
    assert manifest.text is not None
    assert (manifest.text.length, manifest.text.padding_id, manifest.text.too_long) == (20, 0, "refuse")
    assert manifest.text.tokenizer == artifact(published / "tokenizer.json")
    preprocessing = manifest.preprocessing
    assert (preprocessing.policy, preprocessing.anchor, preprocessing.fill) == ("letterbox", "centre", (124, 116, 104))
    assert not preprocessing.scaled_decoding
    assert manifest.verification is not None
    names = [check.name for check in manifest.verification.checks]
    assert "tokenizer: other ids in 1,500 strings" in names
    assert {"sees another phrase: box", "sees another image: box"} <= set(names)
    assert [example.image for example in manifest.golden] == [
        f"golden/{name}" for name in ("landscape.jpg", "portrait.png", "rotated.jpg")
    ]
    assert all(example.phrase for example in manifest.golden)


def test_the_smoke_test_goes_through_the_gateways_tokenizer(published: Path, tmp_path: Path) -> None:
    """Another vocabulary, although its hash is right, gives other boxes."""

    async def smoke() -> None:
        entry, backend = read_entry(published), OnnxRuntimeBackend()
        await backend.load(entry)
        try:
            await check_golden(backend, entry)
        finally:
            await backend.close()

    asyncio.run(smoke())
    manifest, tokenizer = published / MANIFEST_FILE, published / "tokenizer.json"
    kept = manifest.read_bytes(), tokenizer.read_bytes()
    try:
        train_tokenizer(grounding_phrases()[:50], 300).backend_tokenizer.save(str(tokenizer))
        document = json.loads(kept[0])
        document["text"]["tokenizer"] = artifact(tokenizer).model_dump()
        manifest.write_text(json.dumps(document))
        with pytest.raises(ManifestError, match=r"does not reproduce golden/landscape\.jpg"):
            asyncio.run(smoke())
    finally:
        manifest.write_bytes(kept[0])
        tokenizer.write_bytes(kept[1])


def test_a_trained_network_brings_its_tokenizer(tmp_path: Path) -> None:
    family = GROUNDERS["transvg_pp"]
    torch.manual_seed(5)
    trained = architectures.find("transvg_pp").make(**family.narrow)
    positions = {"language_branch.language_backbone.embeddings.position_ids": torch.arange(40)[None]}
    torch.save({"model": trained.state_dict() | positions}, tmp_path / "published.pth")
    request = family.request(tmp_path, weights="checkpoint", checkpoint=tmp_path / "published.pth")
    with pytest.raises(ExportError, match=r"no tokenizer.json or vocab.txt .* --tokenizer FILE"):
        load(request)
    tokenizer = train_tokenizer(["the red circle", "the blue square"], 60)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (tmp_path / "elsewhere").mkdir()
    tokenizer.backend_tokenizer.save(str(tmp_path / "elsewhere/tokenizer.json"))
    for given in (None, tmp_path / "elsewhere", tmp_path / "elsewhere/tokenizer.json"):
        loaded = load(replace(request, tokenizer=given, long_phrases="truncate"))
        assert isinstance(loaded, LoadedGrounder)
        assert loaded.vocabulary.size == len(words)
        assert loaded.vocabulary.ids("The RED circle") == tokenizer("the red circle")["input_ids"]
        assert loaded.answers["text"].too_long == "truncate"
    own, theirs = loaded.network.state_dict(), trained.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert loaded.weights is not None
    assert loaded.weights.unexpected == ("*.embeddings.position_ids",)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_classes": 3}, "has no classes; leave --num-classes out"),
        ({"model_args": GROUNDERS["transvg_pp"].narrow | {"vocabulary": 100}}, "tokens, the network knows 100"),
        ({"model_args": GROUNDERS["transvg_pp"].narrow | {"image_size": 32}}, "fails on images of 64x64"),
        (
            {"source": "vit_vqgan", "long_phrases": "truncate"},
            "vit_vqgan reads no phrases; leave --tokenizer and --long-phrases out",
        ),
        ({"source": "timm/resnet18", "tokenizer": Path("vocab.txt")}, "timm/resnet18 reads no phrases"),
    ],
    ids=["classes", "vocabulary", "image size", "a tokenizer of images", "a classifier"],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        load(GROUNDERS["transvg_pp"].request(tmp_path, **fields))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "normalizer": {"type": "BertNormalizer"}}', "not BERT's tokenizer"),
        ("vocab.txt", "[PAD]\nred\n", r"has no \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
    ],
)
def test_a_tokenizer_that_is_not_berts_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ExportError, match=reason):
        load(GROUNDERS["transvg_pp"].request(tmp_path, tokenizer=tmp_path / name))


def describe(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
