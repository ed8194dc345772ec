"""An image through the tokens and back, and how much of it is left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.fidelity import psnr, ssim
from app.manifest import Entry
from app.tasks.base import Plan

PLAN = Plan(("tokenize", "detokenize"), heavy=True)


@dataclass(frozen=True)
class ReconstructResult:
    """`pixels` uint8 [H,W,3]; `psnr` in dB (infinite: not a value differs) and `ssim` against the frame that was tokenized."""

    pixels: NDArray[np.uint8]
    psnr: float
    ssim: float


class Reconstruct:
    """Send images through the tokens and back: what a tokenizer keeps of each."""

    name = "reconstruct"
    role = "tokenize"

    def plan(self, options: None) -> Plan:
        return PLAN

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: None) -> Tensors:
        return {"image": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: None) -> ReconstructResult:
        """Compare the frame uint8 [1,H,W,3] that went in with the one that came back."""
        frame, pixels = flow[0]["image"][0], flow[-1]["image"][0]
        return ReconstructResult(pixels, psnr(frame, pixels), ssim(frame, pixels))
