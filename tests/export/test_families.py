"""Every family of architectures, from the library to the engine: what torch answers, the ONNX file answers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.fuse import fuse_classifier
from export.informative import sample_images
from export.load import load
from export.rewrites import REWRITES
from export.spec import Engine, Fused, Loaded, image_tensor
from export.to_onnx import to_onnx
from tests.export.detectors import DETECTORS
from tests.export.families import FAMILIES, Family

NARROW = [pytest.param((family, False), id=name) for name, family in FAMILIES.items()]
PUBLISHED = [
    pytest.param((family, True), id=f"{name}-published", marks=pytest.mark.conformance) for name, family in FAMILIES.items()
]
BADLY_SUPPORTED = {"Col2Im", "If", "Loop", "Scan", "NonZero", "Mod", "OneHot", "GridSample", "Einsum", "GatherND", "Pad"}


@dataclass
class Exported:
    """One family's network and its engine."""

    family: Family
    loaded: Loaded
    fused: Fused
    engine: Engine
    published: bool

    @cached_property
    def images(self) -> Tensor:
        return sample_images(self.loaded.preprocessing, 8, seed=1)

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(self.engine.path), options, providers=["CPUExecutionProvider"])

    @cached_property
    def logits(self) -> Tensor:
        return self.reference(self.images)

    def reference(self, images: Tensor) -> Tensor:
        return self.fused.reference(image_tensor(images, self.loaded.preprocessing))

    def run(self, images: Tensor) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = self.session.run(["probabilities"], {"image": images.numpy()})[0]
        return probabilities

    @cached_property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.engine.path).graph


@pytest.fixture(scope="module", params=NARROW + PUBLISHED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    family, published = request.param
    directory: Path = tmp_path_factory.mktemp(family.name)
    variant = family.published if published else family.narrow
    loaded = load(variant.request(directory))
    fused = fuse_classifier(loaded)
    engine = to_onnx(fused, directory / "model.onnx", "fp32")
    yield Exported(family, loaded, fused, engine, published)
    engine.path.unlink()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_engine_agrees_with_torch(exported: Exported, batch: int) -> None:
    expected = exported.logits[:batch].log_softmax(-1).numpy()
    probabilities = exported.run(exported.images[:batch])

    assert probabilities.shape == expected.shape
    np.testing.assert_allclose(probabilities, np.exp(expected), atol=1e-4)
    likely = expected > np.log(1e-6)
    np.testing.assert_allclose(np.log(probabilities[likely]), expected[likely], atol=2e-3)


def test_an_image_alone_gets_the_answer_it_gets_among_others(exported: Exported) -> None:
    together = exported.run(exported.images)
    alone = np.concatenate([exported.run(exported.images[i : i + 1]) for i in range(len(exported.images))])

    np.testing.assert_allclose(alone, together, atol=2e-5)


def test_engine_keeps_the_contract(exported: Exported) -> None:
    height, width = exported.loaded.preprocessing.height, exported.loaded.preprocessing.width
    classes = exported.loaded.num_classes

    assert describe(exported.graph.input) == [("image", onnx.TensorProto.UINT8, ["batch", height, width, 3])]
    assert describe(exported.graph.output) == [("probabilities", onnx.TensorProto.FLOAT, ["batch", classes])]
    assert exported.engine.opset == 20
    assert exported.engine.ir_version == 10
    assert exported.engine.external_data == ()


def test_engine_is_one_that_tensorrt_takes(exported: Exported) -> None:
    operators = Counter(node.op_type for node in exported.graph.node)
    resizes = [node for node in exported.graph.node if node.op_type == "Resize"]

    assert exported.engine.tensorrt is not None
    assert exported.engine.tensorrt.convertible, exported.engine.tensorrt.findings
    assert not BADLY_SUPPORTED & operators.keys()
    assert all(onnx.helper.get_node_attr_value(node, "mode") != b"cubic" for node in resizes)


def test_nothing_that_no_image_changes_is_left_to_compute(exported: Exported) -> None:
    constants = {tensor.name for tensor in exported.graph.initializer}

    assert not [node.name for node in exported.graph.node if constants.issuperset(node.input)]


def test_only_what_needs_it_is_rewritten(exported: Exported) -> None:
    assert set(exported.fused.rewrites) == exported.family.rewrites


def test_weights_make_faults_visible(exported: Exported) -> None:
    images = exported.images[:4]
    right = exported.logits[:4].softmax(-1)

    assert torch.isfinite(exported.logits).all()
    assert exported.logits.std(0).mean() >= 2
    assert moved(right, exported.reference(torch.zeros_like(images))) > 0.15  # a black image
    assert moved(right, exported.reference(images.flip(-1))) > 0.15  # channels swapped


def test_parameters_and_work_are_those_published(exported: Exported) -> None:
    if not exported.published:
        assert exported.engine.parameters < 5e6
        assert exported.engine.macs is not None
        return
    parameters, macs = (figure * 1e6 for figure in exported.family.millions)
    assert exported.engine.parameters == pytest.approx(parameters, rel=0.01)
    assert exported.engine.macs == pytest.approx(macs, rel=0.05)


def test_every_rewrite_is_needed_by_a_family() -> None:
    families = (*FAMILIES.values(), *DETECTORS.values())
    assert {rewrite.name for rewrite in REWRITES} == set().union(*(family.rewrites for family in families))


def describe(values: Any) -> list[tuple[str, int, list[str | int]]]:
    types = [(value.name, value.type.tensor_type) for value in values]
    return [(name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]) for name, kind in types]


def moved(probabilities: Tensor, logits: Tensor) -> float:
    """How far the most changed probability of an image moves, on average."""
    return float((probabilities - logits.softmax(-1)).abs().amax(-1).mean())
