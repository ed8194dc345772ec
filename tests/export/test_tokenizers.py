"""Every tokenizer, from the paper's network to the two engines: the tokens of torch, and its images."""

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

from export import architectures
from export.fuse import fuse
from export.informative import sample_images
from export.load import load
from export.spec import Engine, ExportError, LoadedTokenizer, image_tensor
from export.to_onnx import to_onnx
from export.token_agreement import TOLERANCES, ReferenceTokens, moved_pixels
from tests.export.tokenizers import TOKENIZERS, TokenizerFamily

NARROW = [pytest.param((family, False), id=name) for name, family in TOKENIZERS.items()]
PUBLISHED = [
    pytest.param((family, True), id=f"{name}-published", marks=pytest.mark.conformance) for name, family in TOKENIZERS.items()
]
FLOAT = onnx.TensorProto.FLOAT


@dataclass
class Exported:
    """One tokenizer and its engines."""

    family: TokenizerFamily
    loaded: LoadedTokenizer
    engines: tuple[Engine, Engine]

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        return sample_images(self.loaded.preprocessing, 8, seed=1).numpy()

    @cached_property
    def reference(self) -> ReferenceTokens:
        with torch.inference_mode():
            return ReferenceTokens.of(self.loaded.network, image_tensor(torch.from_numpy(self.images), self.loaded.preprocessing))

    def run(self, index: int, rows: NDArray[Any]) -> NDArray[Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        engine = self.engines[index]
        session = onnxruntime.InferenceSession(str(engine.path), options, providers=["CPUExecutionProvider"])
        answer: NDArray[Any] = session.run(None, {engine.interface.inputs[0].name: rows})[0]
        return answer

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The reference's, as the engine takes them."""
        return self.reference.tokens.reshape(-1, *self.engines[0].interface.outputs[0].shape[1:]).astype(np.int32)


@pytest.fixture(scope="module", params=NARROW + PUBLISHED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    family, published = request.param
    directory: Path = tmp_path_factory.mktemp(family.name)
    loaded = load(family.request(directory, published=published))
    assert isinstance(loaded, LoadedTokenizer)
    first, second = (to_onnx(part, directory / f"{part.interface.role}.onnx", "fp32") for part in fuse(loaded))
    yield Exported(family, loaded, (first, second))
    for engine in (first, second):
        engine.path.unlink()


def test_every_tokenizer_is_here() -> None:
    files = {name: architectures.find(name) for name in architectures.names()}
    assert {name for name, file in files.items() if architectures.task_of(file) == "tokenize"} == set(TOKENIZERS)
    assert all(family.figures.keys() == files[name].VARIANTS.keys() for name, family in TOKENIZERS.items())


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, family in TOKENIZERS.items() for variant in family.figures]
)
def test_parameters_and_work_are_those_published(name: str, variant: str) -> None:
    with torch.device("meta"):
        network = architectures.find(name).make(variant)
        with FlopCounterMode(display=False) as encoder:
            latents = network.encode(torch.zeros(1, 3, 256, 256))
        with FlopCounterMode(display=False) as decoder:
            assert network.decode(torch.zeros(latents.shape)).shape == (1, 3, 256, 256)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    work = [counter.get_total_flops() / 2e9 for counter in (encoder, decoder)]
    assert (millions, *work) == pytest.approx(TOKENIZERS[name].figures[variant], abs=0.051)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_tokens_are_those_of_torch(exported: Exported, batch: int) -> None:
    served = exported.run(0, exported.images[:batch]).reshape(batch, *exported.reference.tokens.shape[1:])
    expected = replace(exported.reference, tokens=exported.reference.tokens[:batch])
    assert np.mean(served == expected.tokens) >= TOLERANCES["fp32"].agreement
    assert expected.margins(served).max(initial=0) <= TOLERANCES["fp32"].margin
    assert min(len(np.unique(exported.reference.tokens[:, book])) for book in range(served.shape[1])) >= 100


@pytest.mark.parametrize("batch", [1, 3])
def test_images_are_those_of_torch(exported: Exported, batch: int) -> None:
    preprocessing = exported.loaded.preprocessing
    with torch.inference_mode():
        restored = exported.loaded.network.detokenize(torch.from_numpy(exported.reference.tokens[:batch])).permute(0, 2, 3, 1)
    levels = (restored * torch.tensor(preprocessing.std) + torch.tensor(preprocessing.mean)) * 255
    expected = levels.round().clamp(0, 255).to(torch.uint8).numpy()
    served = exported.run(1, exported.tokens[:batch])
    assert moved_pixels(served, expected) <= 1 - TOLERANCES["fp32"].pixels
    assert expected.std((1, 2)).min() > 8  # there is something to see
    assert np.isin(expected, (0, 255)).mean() < 0.3


def test_engines_keep_the_contract(exported: Exported) -> None:
    preprocessing, codebook = exported.loaded.preprocessing, exported.loaded.codebook
    image = ("image", onnx.TensorProto.UINT8, ["batch", preprocessing.height, preprocessing.width, 3])
    books = [codebook.count] if codebook.count > 1 else []
    tokens = ("tokens", onnx.TensorProto.INT32, ["batch", *books, *codebook.grid])
    graphs = [onnx.load(engine.path).graph for engine in exported.engines]
    assert [describe(value) for graph in graphs for value in (*graph.input, *graph.output)] == [image, tokens, tokens, image]
    for engine, graph in zip(exported.engines, graphs, strict=True):
        assert (engine.opset, engine.ir_version, engine.external_data) == (20, 10, ())
        assert engine.tensorrt is not None
        assert engine.tensorrt.convertible, engine.tensorrt.findings
        assert not {"ArgMin", "GatherND", "If", "Loop", "Einsum"} & {node.op_type for node in graph.node}
        assert engine.macs


def test_the_search_is_products_with_the_effective_codes(exported: Exported) -> None:
    """Nothing of a projector or of the stored table is left: an engine holds each code once or twice, with its bias."""
    graph = onnx.load(exported.engines[0].path).graph
    codebook = exported.loaded.codebook
    largest = max(np.prod(tensor.dims) for tensor in graph.initializer if codebook.size in tensor.dims)
    assert largest <= codebook.size * (codebook.channels + 1)


def test_in_half_precision_the_search_stays_float32(exported: Exported, tmp_path: Path) -> None:
    """Every product with the codes, and all arithmetic on pixels; tokens that differ are near-ties."""
    encoder, decoder = (to_onnx(part, tmp_path / f"{part.interface.role}.onnx", "fp16") for part in fuse(exported.loaded))
    graph = onnx.load(encoder.path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    winners = {node.input[0] for node in graph.node if node.op_type == "ArgMax"}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.output[0] in winners]
    assert len(products) >= exported.loaded.codebook.count
    assert {types[node.input[1]] for node in products} == {FLOAT}
    assert onnx.TensorProto.FLOAT16 in types.values()
    half = replace(exported, engines=(encoder, decoder))
    served = half.run(0, exported.images).reshape(exported.reference.tokens.shape)
    tolerance = TOLERANCES["fp16"]
    assert np.mean(served == exported.reference.tokens) >= tolerance.agreement
    assert exported.reference.margins(served).max(initial=0) <= tolerance.margin
    assert moved_pixels(half.run(1, exported.tokens[:2]), exported.run(1, exported.tokens[:2])) <= 1 - tolerance.pixels


def test_a_tokenizer_has_no_classes(tmp_path: Path) -> None:
    request = replace(TOKENIZERS["vit_vqgan"].request(tmp_path), num_classes=10, activation="softmax")
    with pytest.raises(ExportError, match="--num-classes, --activation"):
        load(request)


def test_another_image_size_than_the_networks_is_refused(tmp_path: Path) -> None:
    family = TOKENIZERS["vit_vqgan"]
    with pytest.raises(ExportError, match="64x64"):
        load(replace(family.request(tmp_path), model_args=family.narrow | {"image_size": 32}))


def describe(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
