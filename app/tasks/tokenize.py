"""Visual tokenization: an image to its grid of codes, and by request how well the grid keeps it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.errors import InferenceError
from app.fidelity import psnr
from app.manifest import Codebook, Entry
from app.tasks.base import Plan

PLAN = Plan(("tokenize",))
WITH_RECONSTRUCTION = Plan(("tokenize", "detokenize"), heavy=True)


@dataclass(frozen=True)
class TokenizeOptions:
    """`psnr`: whether to turn the tokens into an image again and compare it with the frame they came from."""

    psnr: bool = False


@dataclass(frozen=True)
class TokenizeResult:
    """`tokens` int32 [h,w], or [K,h,w] with K > 1 codebooks. `psnr` in dB (infinite: not a value differs), None when not asked."""

    tokens: NDArray[np.int32]
    codebook: Codebook
    bits_per_pixel: float
    psnr: float | None = None


class Tokenize:
    """Tokenize images: the grid of codes that stands for each."""

    name = "tokenize"
    role = "tokenize"

    def plan(self, options: TokenizeOptions) -> Plan:
        return WITH_RECONSTRUCTION if options.psnr else PLAN

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: TokenizeOptions) -> Tensors:
        return {"image": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: TokenizeOptions) -> TokenizeResult:
        """Take `tokens` int32 [1,h,w] or [1,K,h,w], and `image` uint8 [1,H,W,3] of the way back where it was asked for.

        Raises:
            InferenceError: the engine gave a token that the codebook does not have.
        """
        frame, tokens = flow[0]["image"][0], flow[1]["tokens"][0]
        codebook = codebook_of(entry)
        if tokens.min() < 0 or tokens.max() >= codebook.size:
            raise InferenceError(f"{entry} gave tokens for this image that are not in its codebook.")
        bits_per_pixel = tokens.size * codebook.bits / (frame.shape[0] * frame.shape[1])
        return TokenizeResult(tokens, codebook, bits_per_pixel, psnr(frame, flow[2]["image"][0]) if options.psnr else None)


def codebook_of(entry: Entry) -> Codebook:
    """The codebook of a tokenizer's engine."""
    assert entry.manifest.codebook is not None  # or its manifest would not have been read
    return entry.manifest.codebook
