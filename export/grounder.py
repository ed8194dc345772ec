"""What every grounding network is to an export: an image and a phrase in, one box out."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Grounder(nn.Module, ABC):
    """A network that finds what a phrase describes. It says where, not how sure it is.

    `length`: ids of one phrase, its special tokens and padding included. `vocabulary`: how many ids it knows.
    """

    length: int
    vocabulary: int

    @abstractmethod
    def locate(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalised float32 [B,3,H,W], int64 [B,length] and int64 [B,length] (1 at a token, 0 at padding) -> float32 [B,4]: the
        logits of the box's centre (x, y), width and height."""

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Boxes float32 [B,4], cxcywh in shares of the frame: what training compares, and a verification's reference."""
        return self.locate(images, input_ids, attention_mask).sigmoid()


def corners(boxes: Tensor) -> Tensor:
    """Boxes cxcywh [...,4] -> xyxy [...,4]; they may reach beyond the frame."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)
