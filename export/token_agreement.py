"""How verification compares tokens and restored images, and the tolerances of each precision."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.manifest import Check
from export.agreement import at_least, at_most
from export.tokenizer import Tokenizer

Array = NDArray[Any]


@dataclass(frozen=True)
class TokenTolerance:
    """`agreement`: share of the tokens that must be the reference's, on the same pixels. `margin`: how far beyond the border
    between its own code and the served one a latent may lie where they differ, as a share of the deviation of the latents. `path`:
    the agreement along the whole served path, whose pixels differ by a level here and there. `pixels`: share of the pixels that
    must lie within one level of the reference's in all channels. `golden`: share of the values
    that may be off in the smoke test."""

    agreement: float
    margin: float
    path: float
    pixels: float
    golden: float


TOLERANCES: dict[str, TokenTolerance] = {
    "fp32": TokenTolerance(0.999, 1e-3, path=0.9, pixels=0.999, golden=0.01),
    "fp16": TokenTolerance(0.97, 0.05, path=0.9, pixels=0.999, golden=0.05),
    "bf16": TokenTolerance(0.8, 0.3, path=0.75, pixels=0.9, golden=0.3),
}
DISTINCT = 100  # codes, or half of the codebook where that is less
MOVED = 0.1  # of the tokens or pixels, by whatever must be seen


@dataclass(frozen=True)
class ReferenceTokens:
    """What torch says of images: `tokens` int64 [B,K,h,w], the indices of the `codes` [K,N,D] nearest to `points` [B,K,h,w,D]."""

    tokens: Array
    points: Tensor
    codes: Tensor

    @classmethod
    def of(cls, network: Tokenizer, images: Tensor) -> "ReferenceTokens":
        """Of normalised images float32 [B,3,H,W], each on its own."""
        latents = torch.cat([network.encode(image[None]) for image in images])
        return cls(network.nearest(latents).numpy(), network.points(latents), network.codebooks().double())

    def margins(self, served: Array) -> Array:
        """For each token that is another code than the reference's: how far the latent lies from the border between the two.

        A near-tie lies close to it. The border is the plane of equal distance; lengths are shares of the latents' deviation.
        """
        image, book, row, column = np.nonzero(served != self.tokens)
        points, codes = self.points[image, book, row, column], self.codes
        own, other = codes[book, self.tokens[image, book, row, column]], codes[book, served[image, book, row, column]]
        apart = (own - other).square().sum(1).sqrt().clamp_min(1e-12)
        excess = (points - other).square().sum(1) - (points - own).square().sum(1)
        deviation = self.points.std((0, 2, 3)).square().sum(1).sqrt()[book]
        margins: Array = (excess / (2 * apart) / deviation).numpy()
        return margins


def compare_tokens(what: str, served: Array, reference: ReferenceTokens, tolerance: TokenTolerance) -> Iterator[Check]:
    """Tokens [B,K,h,w] of an engine on the reference's own pixels."""
    codes = reference.codes.shape[1]
    valid = (served >= 0) & (served < codes)
    yield at_least(f"{what}: tokens that are codes", valid.mean(), 1.0, "of tokens")
    yield at_least(f"{what}: token agreement", np.mean(served == reference.tokens), tolerance.agreement, "of tokens")
    margins = reference.margins(np.clip(served, 0, codes - 1))
    yield at_most(f"{what}: largest margin", margins.max(initial=0), tolerance.margin, "of the latents' deviation")


def count_distinct(what: str, served: Array, codes: int) -> Check:
    """How many codes the least used codebook shows: too few, and an agreement means nothing."""
    fewest = min(len(np.unique(served[:, book])) for book in range(served.shape[1]))
    return at_least(f"{what}: distinct codes", fewest, min(DISTINCT, codes // 2))


def compare_restored(what: str, served: Array, reference: Array, tolerance: TokenTolerance) -> Check:
    """Images uint8 [B,H,W,3]."""
    return at_least(f"{what}: pixel agreement", 1 - moved_pixels(served, reference), tolerance.pixels, "of pixels")


def moved_pixels(one: Array, other: Array) -> float:
    """The share of pixels that are more than one level apart in any channel."""
    return float(np.mean((np.abs(one.astype(np.int16) - other) > 1).any(-1)))
