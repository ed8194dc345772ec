"""What every tokenizer is to an export: latents, codebooks and a decoder, and the nearest-code search as the papers write it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

_DISTANCES = 2**24  # computed at a time; 128 MB in float64


class Tokenizer(nn.Module, ABC):
    """A network whose bottleneck is one codebook or several (K), each of N codes of D channels, on a grid of h x w positions.

    `cosine`: latents and codes are compared, and codes decoded, as vectors of unit length.
    """

    cosine: ClassVar[bool] = False

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Normalised float32 [B,3,H,W] -> latents float32 [B,K,D,h,w], before any code is looked up."""

    @abstractmethod
    def codebooks(self) -> Tensor:
        """The effective codes float32 [K,N,D]: projected and normalised as the decoder gets them."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes float32 [B,K,D,h,w] -> normalised images float32 [B,3,H,W], not clamped."""

    @abstractmethod
    def set_codebooks(self, codes: Tensor) -> None:
        """Put parameters in that make `codes` [K,N,D] the effective codebooks (up to their length where `cosine`)."""

    def tokenize(self, images: Tensor) -> Tensor:
        """Normalised float32 [B,3,H,W] -> the nearest codes' indices int64 [B,K,h,w]; of equals the first."""
        return self.nearest(self.encode(images))

    def detokenize(self, tokens: Tensor) -> Tensor:
        """Indices [B,K,h,w] -> normalised images float32 [B,3,H,W]."""
        codes = [codebook[index.long()] for codebook, index in zip(self.codebooks(), tokens.unbind(1), strict=True)]
        return self.decode(torch.stack(codes, 1).permute(0, 1, 4, 2, 3))

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents [B,K,D,h,w] -> indices int64 [B,K,h,w] of the smallest squared distance, in float64."""
        points = self.points(latents)
        found = [
            torch.cat([distances(part, codebook).argmin(-1) for part in _parts(points[:, k].flatten(0, 2), len(codebook))])
            for k, codebook in enumerate(self.codebooks().double())
        ]
        grid = points.shape[:1] + points.shape[2:4]
        return torch.stack([indices.view(grid) for indices in found], 1)

    def points(self, latents: Tensor) -> Tensor:
        """Latents [B,K,D,h,w] as the vectors that are compared with codes: float64 [B,K,h,w,D]."""
        points = latents.permute(0, 1, 3, 4, 2).double()
        return nn.functional.normalize(points, dim=-1) if self.cosine else points


def distances(points: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances [P,N] of points [P,D] from codes [N,D]."""
    squares = points.square().sum(-1, keepdim=True) + codebook.square().sum(-1)
    return squares - 2 * points @ codebook.T


def _parts(points: Tensor, codes: int) -> Iterator[Tensor]:
    step = max(1, _DISTANCES // codes)
    return (points[start : start + step] for start in range(0, len(points), step))
