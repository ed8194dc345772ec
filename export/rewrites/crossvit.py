"""CrossViT's bicubic resize between its branches as two constant matrices: inference engines disagree about bicubic."""

from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a

Size = tuple[int, int]


class MatrixResize(nn.Module):
    """Bicubic resize [B,C,H,W] -> [B,C,h,w] of one fixed size to another, as torch's `interpolate` computes it."""

    def __init__(self, source: Size, target: Size) -> None:
        super().__init__()
        self.rows = nn.Buffer(_matrix(source[0], target[0]))
        self.columns = nn.Buffer(_matrix(source[1], target[1]).T.contiguous())

    def forward(self, image: Tensor) -> Tensor:
        return self.rows @ image @ self.columns


def _matrix(source: int, target: int) -> Tensor:
    """Interpolation is linear in the image, so what it makes of the unit vectors is its matrix [target,source]."""
    units = torch.eye(source).view(1, 1, source, source)
    return nn.functional.interpolate(units, size=(target, source), mode="bicubic", align_corners=False)[0, 0]


def _replace(module: Any) -> nn.Module:
    """The resize moves into the patch embedding of its branch; the network then finds nothing left to resize."""
    network: nn.Module = module
    full: Size = tuple(module.img_size)
    sizes: list[Size] = module.img_size_scaled
    embeddings: nn.ModuleList = module.patch_embed
    for index, size in enumerate(sizes):
        if tuple(size) != full:
            embeddings[index] = nn.Sequential(MatrixResize(full, size), embeddings[index])
    module.img_size_scaled = [full] * len(sizes)
    return network


def _matches(module: Any) -> bool:
    return is_a(module, "timm.models.crossvit.CrossVit") and not module.crop_scale


MATRIX_RESIZE = Rewrite("crossvit-matrix-resize", _matches, _replace)
