"""Every detector, from the paper's network to the engine: the queries and the rows of torch."""

from collections.abc import Callable, Iterator
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
from onnx import TensorProto, helper

from export import architectures
from export.fuse import fuse
from export.informative import sample_images
from export.load import load
from export.phrase_detector import PhraseDetector
from export.row_agreement import TOLERANCES, Told, box_distance, compare_queries, compare_rows
from export.spec import Engine, ExportError, Fused, LoadedDetector, image_tensor
from export.to_onnx import to_onnx
from tests.export.detectors import DETECTORS, DetectorFamily

NARROW = [pytest.param((family, False), id=name) for name, family in DETECTORS.items()]
PUBLISHED = [
    pytest.param((family, True), id=f"{name}-published", marks=pytest.mark.conformance) for name, family in DETECTORS.items()
]
BADLY_SUPPORTED = {"GridSample", "GatherND", "If", "Loop", "Einsum", "NonZero", "Mod", "OneHot", "NonMaxSuppression"}
Arrays = dict[str, NDArray[Any]]


@dataclass
class Exported:
    """One detector and its engine."""

    family: DetectorFamily
    loaded: LoadedDetector
    fused: Fused
    engine: Engine

    @cached_property
    def inputs(self) -> Arrays:
        """Eight images, each with another part of the frame for its content where the engine wants to know."""
        frame = (self.loaded.preprocessing.height, self.loaded.preprocessing.width)
        shares = np.linspace(0.4, 1.0, 8)
        content = np.stack([np.round(frame[0] * shares), np.round(frame[1] * shares[::-1])], 1).astype(np.int32)
        inputs = {"image": sample_images(self.loaded.preprocessing, 8, seed=1).numpy(), "content": content}
        if isinstance(self.loaded.network, PhraseDetector):
            inputs["input_ids"] = self.loaded.network.asked.expand(8, -1, -1).numpy()
        return {spec.name: inputs[spec.name] for spec in self.engine.interface.inputs}

    @cached_property
    def told(self) -> Told:
        return self.tell(None)

    def starting(self, starts: NDArray[Any]) -> Told:
        """`told` of the first images, with queries that start where those of an engine do; its proposals stay its own."""
        return replace(self.tell(starts), proposals=self.told.rows(slice(len(starts))).proposals)

    def tell(self, starts: NDArray[Any] | None) -> Told:
        images = image_tensor(torch.from_numpy(self.inputs["image"]), self.loaded.preprocessing)
        content = torch.from_numpy(self.inputs["content"]) if "content" in self.inputs else None
        count = len(images) if starts is None else len(starts)
        with torch.inference_mode():
            return Told.of(self.loaded.network, images[:count], None if content is None else content[:count], starts)

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        model = onnx.load(self.engine.path)
        for spec in self.fused.inner:
            model.graph.output.append(helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, [None] * len(spec.shape)))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, first: int) -> Arrays:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {name: rows[:first] for name, rows in self.inputs.items()}), strict=True))


@pytest.fixture(scope="module", params=NARROW + PUBLISHED)
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    narrow_detectors: Callable[[str], tuple[LoadedDetector, Fused, Engine]],
) -> Iterator[Exported]:
    family, published = request.param
    if not published:
        yield Exported(family, *narrow_detectors(family.name))
        return
    directory: Path = tmp_path_factory.mktemp(family.name)
    loaded = load(family.request(directory, published=published))
    assert isinstance(loaded, LoadedDetector)
    (fused,) = fuse(loaded)
    engine = to_onnx(fused, directory / "model.onnx", "fp32")
    yield Exported(family, loaded, fused, engine)
    engine.path.unlink()


def test_every_detector_is_here() -> None:
    files = {name: architectures.find(name) for name in architectures.names()}
    ours = {name for name, file in files.items() if architectures.task_of(file) == "detect"}
    assert ours == {name for name, family in DETECTORS.items() if family.processor is None}
    assert all(DETECTORS[name].millions.keys() == files[name].VARIANTS.keys() for name in ours)


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, family in DETECTORS.items() for variant in family.millions]
)
def test_parameters_are_those_published(name: str, variant: str) -> None:
    with torch.device("meta"):
        network = architectures.find(name).make(variant)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(DETECTORS[name].millions[variant], abs=0.051)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_queries_and_rows_are_those_of_torch(exported: Exported, batch: int) -> None:
    served, tolerance = exported.run(batch), TOLERANCES["fp32"]
    told = Told(served["query_scores"], served["query_boxes"], served.get("query_masks"), served.get("proposals"))
    expected = exported.told.rows(slice(batch)) if told.starts is None else exported.starting(told.starts)
    checks = [
        *compare_queries("engine", told, expected, tolerance),
        *compare_rows("engine", served, expected, exported.loaded.network, tolerance),
    ]
    assert not [check for check in checks if not check.passed]
    assert served["classes"].max() < exported.loaded.detection.classes


def test_queries_differ_and_so_do_images(exported: Exported) -> None:
    boxes = exported.told.boxes
    assert np.median(box_distance(boxes, np.roll(boxes, 1, axis=1))) > 0.05
    assert np.median(box_distance(boxes, np.roll(boxes, 1, axis=0))) > 0.01
    best = exported.run(8)["scores"]
    # Where every pair of query and class is a row, the last rows are next to nothing; the better half is not.
    assert 0.02 < best[:, : best.shape[1] // 2].min() < best.max() <= 1
    assert best.std() > 0.01


def test_engine_keeps_the_contract(exported: Exported) -> None:
    preprocessing, detection = exported.loaded.preprocessing, exported.loaded.detection
    graph = onnx.load(exported.engine.path).graph
    rows = detection.queries
    inputs = [("image", TensorProto.UINT8, ["batch", preprocessing.height, preprocessing.width, 3])]
    outputs = [("boxes", TensorProto.FLOAT, ["batch", rows, 4]), ("scores", TensorProto.FLOAT, ["batch", rows])]
    outputs.append(("classes", TensorProto.INT64, ["batch", rows]))
    if detection.content:
        inputs.append(("content", TensorProto.INT32, ["batch", 2]))
    if exported.loaded.text is not None:
        inputs.append(("input_ids", TensorProto.INT64, ["batch", exported.loaded.text.phrases, exported.loaded.text.length]))
    if detection.masks is not None:
        outputs.append(("masks", TensorProto.FLOAT, ["batch", rows, detection.masks.count]))
    assert [describe(value) for value in graph.input] == inputs
    assert [describe(value) for value in graph.output] == outputs
    assert (exported.engine.opset, exported.engine.ir_version, exported.engine.external_data) == (20, 10, ())
    assert exported.engine.tensorrt is not None
    assert exported.engine.tensorrt.convertible, exported.engine.tensorrt.findings
    assert not BADLY_SUPPORTED & {node.op_type for node in graph.node}
    # Shapes behind the masks that transformers makes cannot be inferred; the manifest then tells no multiply-adds.
    assert exported.engine.macs or exported.family.processor is not None


def test_only_what_needs_it_is_rewritten(exported: Exported) -> None:
    assert set(exported.fused.rewrites) == exported.family.rewrites


def test_a_detector_has_no_activation(tmp_path: Path) -> None:
    request = replace(DETECTORS["vidt_plus"].request(tmp_path), activation="softmax")
    with pytest.raises(ExportError, match="--activation"):
        load(request)


def test_the_number_of_classes_is_an_argument(tmp_path: Path) -> None:
    loaded = load(DETECTORS["vidt_plus"].request(tmp_path, num_classes=3))
    assert isinstance(loaded, LoadedDetector)
    assert loaded.detection.classes == 3
    assert loaded.source.arguments["classes"] == 3


def describe(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
