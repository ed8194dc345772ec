"""A network small enough to be exported in a test, with weights that make faults visible, and the stages up to staging."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.manifest import Preprocessing, Source
from export.fuse import fuse_classifier
from export.informative import informative_weights
from export.spec import Engine, ExportRequest, Loaded, Reference, Staged
from export.stage import stage
from export.to_onnx import to_onnx
from export.verify import verify_classifier

CLASSES = 7
PREPROCESSING = Preprocessing(
    height=32,
    width=32,
    policy="shortest_edge",
    resize_height=36,
    resize_width=36,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU())

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class SmallNet(nn.Module):
    """A residual network float32 [B,3,H,W] -> logits [B,num_classes]."""

    def __init__(self, num_classes: int = CLASSES, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def make_loaded(network: nn.Module | None = None, **fields: Any) -> Loaded:
    """What `load` gives for `network`, by default a SmallNet with informative weights; `fields` replace any field."""
    preprocessing = fields.get("preprocessing", PREPROCESSING)
    classes = fields.get("num_classes", CLASSES)
    if network is None:
        torch.manual_seed(0)
        network = SmallNet(classes)
        informative_weights(network, preprocessing, seed=0)
    loaded = Loaded(
        network=network.eval(),
        preprocessing=preprocessing,
        num_classes=classes,
        labels=tuple(f"class {index}" for index in range(classes)),
        activation="softmax",
        source=Source(library="python", architecture="small", weights="random"),
    )
    return replace(loaded, **fields)


def make_request(directory: Path, **fields: Any) -> ExportRequest:
    return ExportRequest(**{"source": "python/small.py:make", "repository": directory / "repository", "name": "small"} | fields)


def make_engine(loaded: Loaded, directory: Path) -> tuple[Engine, Reference]:
    """fuse and to_onnx: an ONNX file in `directory`, and the network it is to agree with."""
    fused = fuse_classifier(loaded)
    return to_onnx(fused, directory / "model.onnx", "fp32"), fused.reference


@contextmanager
def verified(made: tuple[Engine, Reference], loaded: Loaded, request: ExportRequest) -> Iterator[Staged]:
    """stage and verify, ready to publish."""
    engine, reference = made
    with stage([engine], loaded, request) as (staged,):
        yield verify_classifier(staged, reference)
