"""What every dual encoder is to an export: a tower for images and one for texts, whose vectors lie in one space."""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn.functional import normalize


class DualEncoder(nn.Module, ABC):
    """Images and texts become vectors of D numbers; how well two fit is `scale` times the product of them at unit length.

    `length`: ids of one text, its special tokens and padding included. `vocabulary`: how many ids it knows.
    """

    length: int
    vocabulary: int

    @property
    @abstractmethod
    def image_tower(self) -> nn.Module:
        """What only images go through."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor of the product."""

    @property
    @abstractmethod
    def bias(self) -> float | None:
        """What is added to it before a sigmoid; None where a softmax over texts is meant."""

    @property
    @abstractmethod
    def last_layers(self) -> tuple[nn.Linear | nn.Parameter, nn.Linear | nn.Parameter]:
        """What gives the features of images, and of texts: a linear map, or its matrix [width,D]."""

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """Normalised float32 [B,3,H,W] -> float32 [B,D], of any length."""

    @abstractmethod
    def text_features(self, input_ids: Tensor) -> Tensor:
        """int32 or int64 [B,length] -> float32 [B,D], of any length."""

    def encode_images(self, images: Tensor) -> Tensor:
        """As `image_features`, of unit length: a verification's reference."""
        return normalize(self.image_features(images).float(), dim=-1)

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """As `text_features`, of unit length."""
        return normalize(self.text_features(input_ids).float(), dim=-1)
