"""Detectors as users bring them, published by the command and asked over HTTP: the boxes are those of their own code."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torchvision.ops import batched_nms, box_convert
from typer.testing import CliRunner

from app.main import create_app
from app.manifest import Manifest, read_entry
from app.settings import Settings
from export.__main__ import app
from tests import triton
from tests.export.small_yolo import CLASSES, FRAME, HEADS, STRIDES, SmallYolo, save

LEAST = 0.3
LABELS = ("circle", "square", "star")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


def publish(home: Path, form: str, *flags: str, batch: int | None = None) -> Manifest:
    labels = home / "labels.txt"
    labels.write_text("\n".join((*LABELS, *(["cross"] if form == "detr" else []))))
    file = home / f"{form}.onnx"
    save(form, file, batch=batch)
    command = (f"onnx/{file}", "--task", "detect", *HEADS[form], "--interpolation", "nearest", "--labels", str(labels))
    result = CliRunner().invoke(app, [*command, *flags, "--repository", str(home / "models")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return read_entry(home / "models" / form / "1").manifest


def photo(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (9, 11, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def as_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [photo(96, 128), photo(192, 60), photo(70, 70)]
FILES = [("image", as_png(image)) for image in IMAGES]


def gateway(home: Path, model: str, **options: str) -> TestClient:
    settings = Settings(_env_file=None, repository=home / "models", default_detect=model, repository_poll=0, **options)
    return TestClient(create_app(settings))


def own_code(form: str, image: Image.Image, *, anchor: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a user's own script does: letterbox, network, decoding, suppression, and back to the photo. Boxes, scores, classes."""
    scale = min(FRAME[1] / image.width, FRAME[0] / image.height)
    inner = (round(image.width * scale), round(image.height * scale))
    left, top = ((FRAME[1] - inner[0]) // 2, (FRAME[0] - inner[1]) // 2) if anchor == "centre" else (0, 0)
    frame = Image.new("RGB", (FRAME[1], FRAME[0]), (114, 114, 114))
    frame.paste(image.resize(inner, Image.Resampling.NEAREST), (left, top))
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        network = SmallYolo("yolov5" if form == "yolov5-raw" else form).eval()
        table = network(pixels.flip(1) if form == "yolox" else pixels / 255)[0]
    table = table.T if form == "yolov8" else table
    boxes, rest = table[:, :4], table[:, 4:]
    if form == "yolox":
        cells = [(x, y, stride) for stride in STRIDES for y in range(FRAME[0] // stride) for x in range(FRAME[1] // stride)]
        x, y, stride = torch.tensor(cells).T
        centre = torch.stack([(boxes[:, 0] + x) * stride, (boxes[:, 1] + y) * stride], 1)
        boxes = torch.cat([centre, boxes[:, 2:].exp() * stride[:, None]], 1)
    scores, classes = (rest if form == "yolov8" else rest[:, :1] * rest[:, 1:]).max(1)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    kept = batched_nms(corners, scores, classes, 0.7 if form == "yolov8" else 0.45)
    kept = kept[scores[kept] >= LEAST]
    size = np.array([image.width, image.height])
    original = (corners[kept].numpy().reshape(-1, 2, 2) - (left, top)) / inner * size
    original = original.clip(0, size).reshape(-1, 4)
    inside = (original[:, 2:] > original[:, :2]).all(1)
    return original[inside], scores[kept].numpy()[inside], classes[kept].numpy()[inside]


@pytest.mark.parametrize(
    ("form", "batch", "anchor"),
    [("yolov8", 1, "centre"), ("yolov5-raw", None, "centre"), ("yolox", None, "corner")],
)
def test_rows_are_those_of_the_users_own_code(home: Path, form: str, batch: int | None, anchor: str) -> None:
    manifest = publish(home, form, batch=batch)
    assert manifest.detection is not None
    assert (manifest.detection.classes, manifest.labels) == (CLASSES, LABELS)
    assert (manifest.preprocessing.anchor, manifest.preprocessing.fill) == (anchor, (114, 114, 114))
    assert manifest.tensorrt is not None
    assert manifest.tensorrt.convertible
    with gateway(home, form) as client:
        results = client.post(f"/v1/detect?threshold={LEAST}", files=FILES).json()["results"]
        for image, result in zip(IMAGES, results, strict=True):
            boxes, scores, classes = own_code(form, image, anchor=anchor)
            found = result["detections"]
            assert len(scores) == len(found) > 2
            for one in found:
                alike = (np.abs(boxes - one["box"]).max(1) < 0.01) & (np.abs(scores - one["score"]) < 1e-4)
                assert one["class_id"] in classes[alike]
                assert one["label"] == LABELS[one["class_id"]]
        drawn = client.post("/v1/detect", content=FILES[0][1], headers={"Accept": "image/png"})
        assert Image.open(BytesIO(drawn.content)).size == IMAGES[0].size


@pytest.mark.parametrize(("form", "flags"), [("end2end", ()), ("detr", ()), ("yolov5", ("--precision", "fp16"))])
def test_other_heads_pass_verification(home: Path, form: str, flags: tuple[str, ...]) -> None:
    manifest = publish(home, form, *flags)
    assert manifest.detection is not None
    rows, score = {"end2end": (8, "sigmoid"), "detr": (120, "softmax"), "yolov5": (240, "objectness")}[form]
    assert (manifest.detection.queries, manifest.detection.score) == (rows, score)
    assert manifest.verification is not None
    assert manifest.verification.passed


@pytest.mark.triton
def test_triton_gives_the_same_rows(tmp_path: Path) -> None:
    publish(tmp_path, "yolov8-raw")
    with triton.serve(tmp_path / "models") as server:
        remote = {"backend": "triton", "triton_url": f"127.0.0.1:{server.ports.grpc}"}
        answers = []
        for options in ({}, remote):
            with gateway(tmp_path, "yolov8-raw", **options) as client:
                answers.append(
                    [client.post("/v1/detect?threshold=0.1", files=files).json()["results"] for files in (FILES, FILES[:1])]
                )
    for embedded, served in zip(*answers, strict=True):
        for one, other in zip(embedded, served, strict=True):
            assert len(one["detections"]) == len(other["detections"]) > 2
            scores = [[found["score"] for found in result["detections"]] for result in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
