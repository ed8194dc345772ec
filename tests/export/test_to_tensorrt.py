import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.manifest import TensorSpec
from export import pipeline
from export.plan import Plan, require_tensorrt
from export.spec import Engine, ExportError, Loaded, MissingToolError, Reference
from export.to_tensorrt import log_message, parser_message, profile_shapes, timing_cache_path, to_tensorrt
from tests.export.small import make_request

Made = tuple[Engine, Reference]

HAS_TENSORRT = importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available()
REQUIRED = "gpu" in os.environ.get("VITRINE_REQUIRE", "").split(",")
needs_gpu = pytest.mark.skipif(not HAS_TENSORRT and not REQUIRED, reason="needs TensorRT and an NVIDIA GPU")
without_tensorrt = pytest.mark.skipif(HAS_TENSORRT, reason="TensorRT is here")


@dataclass
class ParserError:
    """An error as TensorRT's parser gives it."""

    operator: str
    name: str
    text: str

    def node_operator(self) -> str:
        return self.operator

    def node_name(self) -> str:
        return self.name

    def desc(self) -> str:
        return self.text


@pytest.mark.parametrize("max_batch", [1, 8])
def test_one_profile_spans_the_batches(max_batch: int) -> None:
    smallest, usual, largest = profile_shapes(TensorSpec(name="image", dtype="uint8", shape=(-1, 48, 32, 3)), max_batch)
    assert smallest == (1, 48, 32, 3)
    assert usual == largest == (max_batch, 48, 32, 3)


def test_timings_are_kept_per_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache_path("10.15.1", "NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "vitrine" / "tensorrt" / "10.15.1-nvidia-h100-80gb-hbm3.cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert timing_cache_path("10.15.1", "NVIDIA L4").parent == Path.home() / ".cache" / "vitrine" / "tensorrt"


def test_all_parser_errors_are_in_one_message() -> None:
    message = parser_message([ParserError("Col2Im", "fold", "Plugin not found"), ParserError("", "", "No graph")])
    assert message.splitlines()[1:] == ["  Col2Im fold: Plugin not found", "  graph : No graph"]
    assert "no reason" in parser_message([])


def test_the_end_of_the_log_is_told() -> None:
    assert log_message([]) == "It said nothing."
    assert log_message([f"error: {i}" for i in range(100)]).splitlines()[1:] == [f"  error: {i}" for i in range(80, 100)]


@without_tensorrt
def test_a_missing_tensorrt_is_one_sentence_and_exit_code_2() -> None:
    with pytest.raises(MissingToolError) as caught:
        require_tensorrt()
    assert caught.value.exit_code == 2
    assert str(caught.value).count(".") == 1


@without_tensorrt
def test_it_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(request: object) -> Loaded:
        raise AssertionError("the network was loaded first")

    monkeypatch.setattr(pipeline, "load", too_late)
    stages: list[str] = []
    with pytest.raises(MissingToolError):
        pipeline.export(make_request(tmp_path, engine="tensorrt"), stages.append)
    assert not stages
    assert not list(tmp_path.iterdir())


@without_tensorrt
def test_nothing_is_half_written(tmp_path: Path, made: Made) -> None:
    with pytest.raises(MissingToolError):
        to_tensorrt(made[0], tmp_path / "model.plan", "fp32", 8)
    assert not list(tmp_path.iterdir())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_built_verified_and_published(
    tmp_path: Path, loaded: Loaded, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "load", lambda request: loaded)
    request = make_request(tmp_path, engine="tensorrt", precision=precision)
    for version in (1, 2):
        published = pipeline.export(request, lambda stage: None)
        assert published.version == version
    assert published.manifest.engine.kind == "tensorrt"
    assert (published.path / "model.plan").stat().st_size == published.manifest.engine.size
    assert list((tmp_path / "cache").rglob("*.cache"))


@needs_gpu
@pytest.mark.gpu
def test_a_plan_takes_no_more_than_its_largest_batch(tmp_path: Path, made: Made) -> None:
    engine = to_tensorrt(made[0], tmp_path / "model.plan", "fp32", 2)
    plan = Plan(engine.path, engine.interface.outputs)
    images = np.zeros((3, 32, 32, 3), np.uint8)
    assert plan({"image": images[:2]})["probabilities"].shape == (2, 7)
    with pytest.raises(ExportError, match="3 rows at once"):
        plan({"image": images})


@needs_gpu
@pytest.mark.gpu
def test_what_the_parser_refuses_is_told(tmp_path: Path, made: Made) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(made[0].path.read_bytes().replace(b"Gelu", b"Gulu"))
    with pytest.raises(ExportError, match="Gulu"):
        to_tensorrt(replace(made[0], path=broken), tmp_path / "model.plan", "fp32", 2)


@needs_gpu
@pytest.mark.gpu
def test_another_precision_than_the_graphs_is_refused(tmp_path: Path, made: Made) -> None:
    with pytest.raises(ExportError, match="fp16 plan needs a fp16 graph"):
        to_tensorrt(made[0], tmp_path / "model.plan", "fp16", 2)
