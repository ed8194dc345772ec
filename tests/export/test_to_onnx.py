"""The fused graph as a file: the contract's names and limits, its size, its work, its precision."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from app.manifest import Precision, TensorSpec
from export import to_onnx as module
from export.fuse import fuse_classifier
from export.informative import sample_images
from export.spec import Engine, ExportError, Fused, Interface, image_tensor
from export.to_onnx import to_onnx
from tests.export.small import PREPROCESSING, SmallNet, make_loaded


def write(network: nn.Module | None, path: Path, precision: Precision = "fp32") -> Engine:
    loaded = make_loaded(network)
    return to_onnx(fuse_classifier(loaded), path, precision)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return write(None, tmp_path_factory.mktemp("engine") / "model.onnx")


def test_engine_describes_its_file(engine: Engine) -> None:
    model = onnx.load(engine.path)

    assert (engine.kind, engine.precision, engine.opset, engine.ir_version) == ("onnx", "fp32", 20, 10)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version == 10
    assert engine.parameters == sum(parameter.numel() for parameter in SmallNet().parameters())
    assert engine.tensorrt is not None
    assert engine.tensorrt.convertible


def test_uint8_goes_nowhere_but_into_a_cast(engine: Engine) -> None:
    assert [node.op_type for node in onnx.load(engine.path).graph.node if "image" in node.input] == ["Cast"]


def test_class_tokens_read_the_batch_size_off_the_cast(tmp_path: Path) -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = torch.cat((self.token.expand(images.shape[0], -1, -1), images.flatten(2).transpose(1, 2)), dim=1)
            return tokens.amax(1)

    nodes = onnx.load(write(Token(), tmp_path / "model.onnx").path).graph.node
    assert "Shape" in [node.op_type for node in nodes]
    assert [node.op_type for node in nodes if "image" in node.input] == ["Cast"]


def test_file_holds_no_notes_of_the_exporter(engine: Engine) -> None:
    model = onnx.load(engine.path)

    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path(__file__).parent).encode() not in engine.path.read_bytes()


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(None, tmp_path / "model.onnx")

    assert capfd.readouterr() == ("", "")


def test_padding_by_nothing_is_dropped(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self, amount: int) -> None:
            super().__init__()
            self.amount = amount

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.pad(images, (0, self.amount, 0, 0)).mean((2, 3))

    operators = {
        amount: [node.op_type for node in onnx.load(write(Padded(amount), tmp_path / f"{amount}.onnx").path).graph.node]
        for amount in (0, 2)
    }

    assert "Pad" in operators[2]
    assert "Pad" not in operators[0]


def test_weights_leave_the_file_only_when_one_protobuf_cannot_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROTOBUF_LIMIT", 1000)
    whole = write(None, tmp_path / "large.onnx")
    monkeypatch.undo()
    small = write(None, tmp_path / "small.onnx")

    assert whole.external_data == (tmp_path / "large.onnx.data",)
    assert whole.external_data[0].stat().st_size > 1000
    assert small.external_data == ()
    assert not (tmp_path / "small.onnx.data").exists()
    assert (whole.macs, whole.tensorrt) == (small.macs, small.tensorrt)
    image = sample_images(PREPROCESSING, 2, seed=0).numpy()
    np.testing.assert_array_equal(run(whole, image), run(small, image))


class Reshaped(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, -1)[:, :7]


class Counted(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + torch.zeros(3).expand(len(images), -1)


@pytest.mark.parametrize("network", [Reshaped(), Counted()])
def test_a_network_that_fixes_the_batch_is_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fixes the batch at 2"):
        write(network, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int8"):
        write(None, tmp_path / "model.onnx", "int8")


def test_fp16_is_half_the_size_and_nearly_as_good(engine: Engine, tmp_path: Path) -> None:
    half = write(None, tmp_path / "half.onnx", "fp16")
    model = onnx.load(half.path)
    images = sample_images(PREPROCESSING, 8, seed=1)
    reference = fuse_classifier(make_loaded()).reference(image_tensor(images, PREPROCESSING)).softmax(-1).numpy()
    error = np.abs(run(half, images.numpy()) - reference).max()

    assert half.precision == "fp16"
    assert half.path.stat().st_size < 0.7 * engine.path.stat().st_size
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [
        onnx.TensorProto.UINT8,
        onnx.TensorProto.FLOAT,
    ]
    assert 1e-6 < error < 0.02


def run(engine: Engine, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(engine.path, providers=["CPUExecutionProvider"])
    probabilities: np.ndarray = session.run(["probabilities"], {"image": images})[0]
    return probabilities


class TwiceClipped(nn.Module):
    """Two readers each clip again what was clipped: the inverse sigmoids of iterative box refinement."""

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        first = shares.sigmoid()
        return inverse_sigmoid(first) + 2 * (inverse_sigmoid(first) + shares).sigmoid()


def inverse_sigmoid(shares: torch.Tensor) -> torch.Tensor:
    held = shares.clamp(min=0, max=1)
    return torch.log(held.clamp(min=1e-5) / (1 - held).clamp(min=1e-5))


def test_clips_of_clips_keep_their_bounds(tmp_path: Path) -> None:
    source = TensorSpec(name="image", dtype="float32", shape=(-1, 4))
    interface = Interface("classify", (source,), (source.model_copy(update={"name": "probabilities"}),))
    path = to_onnx(Fused(TwiceClipped(), interface, lambda image: image, parameters=0), tmp_path / "model.onnx", "fp32").path
    rows = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = TwiceClipped()(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(session.run(None, {"image": rows})[0], expected, atol=1e-5)
