"""The way back: a grid of tokens to the image that it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import ImageInfo
from app.errors import InvalidValueError, TooLargeError
from app.manifest import Codebook, Entry
from app.tasks.base import Plan

PLAN = Plan(("detokenize",))


@dataclass(frozen=True)
class DetokenizeResult:
    """`pixels` uint8 [H,W,3]."""

    pixels: NDArray[np.uint8]


class Detokenize:
    """Turn token grids into images."""

    name = "detokenize"
    role = "detokenize"

    def plan(self, options: None) -> Plan:
        return PLAN

    def prepare(self, value: NDArray[Any], entry: Entry, image: ImageInfo | None, options: None) -> Tensors:
        """Take one grid that `check_grids` gave."""
        return {"tokens": value[None]}

    def finish(self, flow: Sequence[Tensors], entry: Entry, image: ImageInfo | None, options: None) -> DetokenizeResult:
        return DetokenizeResult(flow[-1]["image"][0])


def check_grids(tokens: NDArray[Any], codebook: Codebook, most: int) -> NDArray[np.int32]:
    """Hold what was sent against the codebook before an engine sees it.

    Args:
        tokens: integers, one grid or a batch: [h,w] or [B,h,w] or [B,1,h,w]; with K > 1 codebooks [K,h,w] or [B,K,h,w].
        most: grids that a batch may have.

    Returns:
        The batch as the engine takes it: int32 [B,h,w], or [B,K,h,w] with K > 1 codebooks.

    Raises:
        InvalidValueError: no integers, another grid or number of codebooks, or a token that the codebook does not have.
        TooLargeError: more than `most` grids.
    """
    if tokens.dtype.kind not in "iu":
        raise InvalidValueError(f"tokens must be integers, not {tokens.dtype}.", field="tokens")
    sent = list(tokens.shape)
    one = codebook.grid if codebook.count == 1 else (codebook.count, *codebook.grid)
    if tokens.ndim == 4 and tokens.shape[1] == codebook.count == 1:
        tokens = tokens[:, 0]
    if tokens.ndim == len(one):
        tokens = tokens[None]
    if tokens.shape[1:] != one:
        named = "[h,w]" if codebook.count == 1 else "[codebooks,h,w]"
        raise InvalidValueError(
            f"A grid of this model's tokens is {named} = {list(one)}, or a batch of those; the request has {sent}.",
            field="tokens",
        )
    if not len(tokens):
        raise InvalidValueError("There is no grid in tokens; send at least one.", field="tokens")
    if len(tokens) > most:
        raise TooLargeError(f"{len(tokens)} token grids in one request; this server takes {most}.", field="tokens")
    if tokens.min() < 0 or tokens.max() >= codebook.size:
        raise InvalidValueError(f"tokens must be 0 to {codebook.size - 1}, the codes of this model.", field="tokens")
    return np.ascontiguousarray(tokens, np.int32)
