"""A narrow detector with the heads of several families, decoded as the families' own code does it, and its export as users make it.

Every form has the same features, so that what one gives raw and another decoded is the same.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
FRAME = (64, 96)  # height, width
STRIDES = (8, 16)
ANCHORS = (((8.0, 12.0), (24.0, 16.0)), ((32.0, 20.0), (40.0, 56.0)))  # width, height of each level's two
BINS = 16

HEADS: dict[str, tuple[str, ...]] = {
    "yolov8": ("--head", "yolov8"),
    "yolov8-raw": ("--head", "yolov8-raw", "--strides", "8,16"),
    "yolov5": ("--head", "yolov5"),
    "yolov5-raw": ("--head", "yolov5-raw", "--anchors", "8,12,24,16,32,20,40,56"),
    "yolox": ("--head", "yolox", "--strides", "8,16"),
    "detr": ("--head", "detr", "--mean", "0", "--std", "1", "--letterbox", "corner"),
    "end2end": ("--head", "end2end", "--num-classes", "3"),
}
"""What a user says of each form."""


class SmallYolo(nn.Module):
    """Pixels float32 [B,3,*FRAME] -> what `form` gives: one table, maps of the levels, or boxes and logits."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.scale = 1 / 255 if form == "yolox" else 1.0
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.down = nn.Conv2d(16, 16, 2, stride=2)
        numbers = {"yolov8": 4 * BINS + CLASSES, "yolov8-raw": 4 * BINS + CLASSES, "detr": 4 + CLASSES + 2}
        self.anchors = 2 if form.startswith("yolov5") else 1
        width = numbers.get(form, 5 + CLASSES) * self.anchors
        self.heads = nn.ModuleList(nn.Conv2d(16, width, 3, padding=1) for _ in STRIDES)
        for layer in (self.stem, self.down, *self.heads):
            nn.init.normal_(layer.weight, std=2.5 / layer.weight[0].numel() ** 0.5)
            nn.init.normal_(layer.bias, std=0.5)

    def forward(self, images: Tensor) -> Any:
        fine = (self.stem(images * self.scale - 0.5 * (self.form != "yolox")) * 2).sin()
        maps = [head(features) * 0.7 for head, features in zip(self.heads, (fine, self.down(fine).sin()), strict=True)]
        if self.form == "yolov8-raw":
            return tuple(maps)
        cells = [level.unflatten(1, (self.anchors, -1)).permute(0, 1, 3, 4, 2) for level in maps]
        if self.form == "yolov5-raw":
            return tuple(cells)
        decode = {"yolov8": self.distances, "yolov5": self.anchored, "yolox": self.undecoded}.get(self.form, self.relative)
        table = torch.cat([decode(level, index).flatten(1, 3) for index, level in enumerate(cells)], 1)
        if self.form == "yolov8":
            return table.transpose(1, 2)
        if self.form == "detr":
            return table[..., :4], table[..., 4:]
        return self.final(table) if self.form == "end2end" else table

    def grid(self, level: Tensor) -> Tensor:
        """[H,W,2]: column and row of every cell."""
        rows, columns = torch.meshgrid(torch.arange(level.shape[2]), torch.arange(level.shape[3]), indexing="ij")
        return torch.stack([columns, rows], -1)

    def distances(self, level: Tensor, index: int) -> Tensor:
        bins = level[..., : 4 * BINS].unflatten(-1, (4, BINS)).softmax(-1)
        before, after = (bins * torch.arange(BINS)).sum(-1).chunk(2, -1)
        centre = self.grid(level) + 0.5
        box = torch.cat([centre + (after - before) / 2, before + after], -1) * STRIDES[index]
        return torch.cat([box, level[..., 4 * BINS :].sigmoid()], -1)

    def anchored(self, level: Tensor, index: int) -> Tensor:
        share = level.sigmoid()
        centre = (share[..., :2] * 2 - 0.5 + self.grid(level)) * STRIDES[index]
        size = (share[..., 2:4] * 2) ** 2 * torch.tensor(ANCHORS[index]).view(1, 2, 1, 1, 2)
        return torch.cat([centre, size, share[..., 4:]], -1)

    def undecoded(self, level: Tensor, index: int) -> Tensor:
        return torch.cat([level[..., :4], level[..., 4:].sigmoid()], -1)

    def relative(self, level: Tensor, index: int) -> Tensor:
        centre = (level[..., :2].sigmoid() + self.grid(level)) / torch.tensor([level.shape[3], level.shape[2]])
        return torch.cat([centre, level[..., 2:4].sigmoid() / 2, level[..., 4:]], -1)

    def final(self, table: Tensor) -> Tensor:
        """The best eight, xyxy in pixels of the frame, with their score and class."""
        score, found = table[..., 5:].sigmoid().max(-1)
        best, index = score.topk(8)
        rows = table.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        pixels = torch.tensor([FRAME[1], FRAME[0]])
        first, last = (rows[..., :2] - rows[..., 2:4] / 2) * pixels, (rows[..., :2] + rows[..., 2:4] / 2) * pixels
        return torch.cat([first, last, best.unsqueeze(-1), found.gather(1, index).unsqueeze(-1)], -1)


def save(form: str, file: Path, *, batch: int | None = None) -> SmallYolo:
    """Write the ONNX file of a form, with a free batch unless one is given; gives the network."""
    network = SmallYolo(form).eval()
    axes = None if batch else {"images": {0: "batch"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = (torch.zeros(batch or 1, 3, *FRAME),)
        torch.onnx.export(network, example, file, dynamo=False, input_names=["images"], dynamic_axes=axes, opset_version=17)
    return network
