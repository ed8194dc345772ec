import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import export.report
import export.served
from app.cli import app as vitrine
from app.decode import ImageInfo, OpenedImage, decode
from app.manifest import check_hashes, read_entry
from export.__main__ import app
from export.detect_options import DetectOptions
from export.spec import Engine, ExportRequest, Loaded, OnnxInterface, PreprocessingOverrides, Reference
from tests.export.small import SmallNet

PICTURE = ("--input-size", "32", "--resize", "36", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
NETWORK = "python/tests/export/small.py:SmallNet"


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., Result]:
    """The command with `--repository` in a fresh directory; anything but an exit is raised."""

    def run(*arguments: object) -> Result:
        command = [*map(str, arguments), "--repository", str(tmp_path / "repository")]
        return CliRunner().invoke(app, command, catch_exceptions=False, terminal_width=200)

    return run


@pytest.fixture
def parsed(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExportRequest]:
    """What the command line would have exported."""

    def run(*arguments: object) -> ExportRequest:
        seen: list[ExportRequest] = []

        def note(request: ExportRequest, out: Console, err: Console, *, debug: bool) -> int:
            seen.append(request)
            return 0

        monkeypatch.setattr(export.report, "run", note)
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        return seen[0]

    return run


def test_without_options_the_defaults_of_the_record_hold(parsed: Callable[..., ExportRequest], tmp_path: Path) -> None:
    assert parsed("timm/convnext_atto") == ExportRequest(source="timm/convnext_atto", repository=tmp_path / "repository")


def test_every_option_arrives(parsed: Callable[..., ExportRequest], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    request = parsed(
        *("onnx/their.onnx", "--name", "pets", "--num-classes", 2, "--labels", tmp_path / "labels.txt", "--activation", "sigmoid"),
        *("--input-size", "192x256", "--resize", "200X280", "--interpolation", "lanczos", "--mean", "0.5", "--std", "1,2,3"),
        *("--scale", "1", "--layout", "NHWC", "--colour", "BGR", "--output", "probabilities", "--input-name", "x"),
        *("--output-name", "y", "--engine", "tensorrt", "--precision", "bf16", "--max-batch", 4, "--licence", "MIT"),
        *("--description", "pets of all kinds", "--seed", 7),
    )
    assert request == ExportRequest(
        source="onnx/their.onnx",
        repository=tmp_path / "repository",
        name="pets",
        num_classes=2,
        labels=tmp_path / "labels.txt",
        preprocessing=PreprocessingOverrides((192, 256), (200, 280), "lanczos", (0.5,), (1.0, 2.0, 3.0), 1.0),
        onnx=OnnxInterface("NHWC", "BGR", "probabilities", "x", "y"),
        activation="sigmoid",
        engine="tensorrt",
        precision="bf16",
        max_batch=4,
        licence="MIT",
        description="pets of all kinds",
        seed=7,
    )


def test_what_the_outputs_of_a_detector_mean_arrives(parsed: Callable[..., ExportRequest]) -> None:
    names = ("--boxes-name", "b", "--scores-name", "s", "--classes-name", "c", "--box-format", "xywh", "--box-units", "shares")
    cells = ("--background", "last", "--strides", "8,16", "--anchors", "10,13,16.5,30", "--nms", "0.5", "--agnostic-nms")
    rows = ("--single-label", "--score-threshold", 0.2, "--max-detections", 10, "--letterbox", "corner", "--pad", "1,2,3")
    request = parsed("onnx/their.onnx", "--task", "detect", "--head", "boxes", *names, *cells, *rows)
    anchors = (10.0, 13.0, 16.5, 30.0)
    assert request.detection == DetectOptions(
        *("boxes", "b", "s", "c", "xywh", "shares", "last", (8, 16), anchors, 0.5, True, False, 0.2, 10, "corner", (1, 2, 3))
    )
    assert parsed("onnx/their.onnx", "--task", "detect", "--nms", "none").detection == DetectOptions(nms=0.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nms", "45"], "--nms takes an overlap between 0 and 1"),
        (["--strides", "8,0"], "--strides takes whole numbers of 1 or more"),
        (["--anchors", "10;13"], "--anchors takes numbers"),
        (["--max-detections", "4000"], "max-detections"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_of_a_detector_is_said(call: Callable[..., Result], arguments: list[str], says: str) -> None:
    result = call("onnx/their.onnx", "--task", "detect", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_arguments_of_the_network_are_python_literals_or_text(parsed: Callable[..., ExportRequest]) -> None:
    arguments = ("depths=(1, 2)", "drop=0.5", "flag=True", "norm_layer=batchnorm2d", "text=a=b", "none=None", "empty=")
    request = parsed("timm/x", *(part for argument in arguments for part in ("--model-arg", argument)))
    assert request.model_args == {
        "depths": (1, 2),
        "drop": 0.5,
        "flag": True,
        "norm_layer": "batchnorm2d",
        "text": "a=b",
        "none": None,
        "empty": "",
    }


@pytest.mark.parametrize(("option", "weights"), [("--pretrained", "pretrained"), ("--random-init", "random")])
def test_the_weights_are_named_by_a_flag(parsed: Callable[..., ExportRequest], option: str, weights: str) -> None:
    assert parsed("timm/x", option).weights == weights


def test_a_checkpoint_is_a_way_to_get_weights(parsed: Callable[..., ExportRequest], tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    request = parsed("timm/x", "--checkpoint", tmp_path / "w.pth")
    assert (request.weights, request.checkpoint) == ("checkpoint", tmp_path / "w.pth")


@pytest.mark.parametrize(("text", "resize"), [("256", 256), ("256x256", (256, 256)), ("192X256", (192, 256))])
def test_a_resize_is_a_shortest_edge_or_a_stretch(parsed: Callable[..., ExportRequest], text: str, resize: Any) -> None:
    assert parsed("timm/x", "--resize", text).preprocessing.resize == resize


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pretrained", "--random-init"], "Choose one of"),
        (["--input-size", "12x"], "HEIGHTxWIDTH"),
        (["--input-size", "big"], "HEIGHTxWIDTH"),
        (["--resize", "1x2x3"], "HEIGHTxWIDTH"),
        (["--mean", "a,b,c"], "--mean takes numbers"),
        (["--model-arg", "depths"], "KEY=VALUE"),
        (["--model-arg", "2x=3"], "KEY=VALUE"),
        (["--layout", "NHWC"], "only for the source onnx/FILE"),
        (["--precision", "bf16"], "--engine tensorrt"),
        (["--precision", "int4"], "int4"),
        (["--max-batch", "0"], "max-batch"),
        (["--name", "My Net"], "--name takes"),
        (["--head", "yolov8", "--pad", "0"], "--head, --pad is only for --task detect"),
        (["--task", "detect"], "--task is only for the source onnx/FILE"),
        (["--checkpoint", "no/such.pth"], "no/such.pth"),
        (["--labels", "no/such.txt"], "no/such.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_said_and_ends_with_2(call: Callable[..., Result], arguments: list[str], says: str) -> None:
    result = call("timm/convnext_atto", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_a_network_of_ones_own_is_published(call: Callable[..., Result], tmp_path: Path) -> None:
    checkpoint = tmp_path / "mine.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{key}": value for key, value in SmallNet(2).state_dict().items()}}, checkpoint)
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\n")
    options = ("--num-classes", 2, "--labels", labels, "--checkpoint", checkpoint, "--model-arg", "width=12", *PICTURE)
    result = call(NETWORK, *options, "--name", "pets", "--licence", "MIT")
    assert result.exit_code == 0, result.output
    manifest = read_entry(tmp_path / "repository" / "pets" / "1").manifest
    assert (manifest.labels, manifest.source.weights, manifest.source.licence) == (("cat", "dog"), "checkpoint", "MIT")
    assert manifest.verification is not None
    for told in (
        "pets@1",
        "module.",
        "state_dict",
        f"{manifest.parameters:,}",
        "engine: logits",
        "onnx-tensorrt",
        "verify against torch",
    ):
        assert told in result.output
    assert f"--model {manifest.model}" in result.stdout


def test_an_onnx_file_of_ones_own_is_published_twice(call: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "their.onnx"
    torch.manual_seed(0)
    example = (torch.zeros(2, 3, 32, 32),)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(SmallNet().eval(), example, dynamo=True, dynamic_shapes=shapes, opset_version=18, verbose=False)
    assert program is not None
    program.save(file)
    for version in (1, 2):
        result = call(f"onnx/{file}", *PICTURE)
        assert result.exit_code == 0, result.output
        check_hashes(read_entry(tmp_path / "repository" / "their" / str(version)))


def test_what_cannot_be_exported_ends_with_1(call: Callable[..., Result], tmp_path: Path) -> None:
    result = call(NETWORK, *PICTURE)
    assert result.exit_code == 1
    assert "error: Say where the weights come from" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_tensorrt_ends_with_2_and_leaves_nothing(call: Callable[..., Result], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = call(NETWORK, "--random-init", *PICTURE, "--engine", "tensorrt")
    assert result.exit_code == 2
    assert result.stderr.strip().startswith("error: TensorRT")
    assert not list(tmp_path.iterdir())


def test_a_failed_verification_ends_with_3_and_leaves_nothing(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[Engine, Reference], loaded: Loaded
) -> None:
    def black(opened: OpenedImage) -> tuple[Image.Image, ImageInfo]:
        image, info = decode(opened)
        return Image.new("RGB", image.size), info

    monkeypatch.setattr(export.served, "decode", black)
    monkeypatch.setattr("export.pipeline.load", lambda request: loaded)
    result = call(NETWORK, "--random-init")
    assert result.exit_code == 3
    assert "pixels: off by more than one level" in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "nonsense", "--random-init", "--repository", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: 'nonsense' is not a source" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_what_nobody_foresaw_is_a_sentence_unless_debugging(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: ExportRequest, listener: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(export.report, "export", fail)
    result = call("timm/x", "--random-init")
    assert result.exit_code == 1
    assert "surprise" in result.output
    assert "Traceback" not in result.output
    with pytest.raises(KeyError):
        call("timm/x", "--random-init", "--debug")


def test_without_torch_it_says_what_to_install(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "export.report", None)
    result = call("timm/x", "--random-init")
    assert result.exit_code == 2
    assert 'pip install -e ".[export]"' in result.output


@pytest.mark.parametrize("role", export.report.NEXT)
def test_what_to_try_next_is_a_command(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "PHOTO", "PNG")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(vitrine, [*export.report.NEXT[role].split(), "--local", "--repository", ".", "--model", "mine"])
    task = {"image": "embed"}.get(role, role)
    assert f"There is no model 'mine'. Models for {task}: none." in result.output
