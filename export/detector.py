"""What every detector is to an export: queries, each with logits of the classes and a box, and the choice of the best of them."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

from torch import Tensor, nn

from app.manifest import MaskCoefficients


class Queries(NamedTuple):
    """What a detector says of every query, before any is chosen.

    `logits` float32 [B,Q,K]; `boxes` float32 [B,Q,4], xyxy in shares of the frame; `masks` float32 [B,Q,coefficients], or None.
    `proposals` float32 [B,S]: how likely each place of the image looked, where the queries start from the Q likeliest; else None.
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    proposals: Tensor | None = None


class Detections(NamedTuple):
    """The best rows, the best first: `boxes` [B,N,4], `scores` [B,N], `classes` int64 [B,N], `masks` [B,N,C] or None."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None = None


class Detector(nn.Module, ABC):
    """A network that answers an image with queries.

    `score` says what becomes of the logits. `sigmoid`: a row is a pair of query and class, and one query may give several;
    `softmax`: a row is a query with its likeliest class, the last logit being that of `no object`. `rows` is how many are given
    (of `softmax`: as many as there are queries). `content`: the network wants to be told where padding begins. `proposes`: queries
    start from places that the network itself proposes.
    """

    score: Literal["sigmoid", "softmax"]
    rows: int
    content: bool
    proposes: bool = False
    mask_coefficients: MaskCoefficients | None = None

    @property
    def pairs(self) -> bool:
        """Whether a row is a pair of query and class, so that one query may give several; else it is a query with its likeliest."""
        return self.score == "sigmoid"

    @abstractmethod
    def encode(self, images: Tensor, content: Tensor | None) -> Tensor:
        """Normalised float32 [B,3,H,W], and int32 [B,2], height and width of what is no padding (None: the frame has none).

        Returns:
            float32 [B,...]: all that `decode` needs of the images. An engine of half precision computes it in that.
        """

    @abstractmethod
    def decode(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> Queries:
        """What `encode` gives -> every query; `frame` is height and width. Stays float32, since boxes need their places exactly."""

    def starting_at(self, places: Tensor) -> AbstractContextManager[None]:
        """Within, the queries start from `places` int64 [B,Q] of the proposals, in this order, whatever looks likeliest.

        Places that look alike change order with the last bit of a score. Verification takes the engine's choice for given, once
        all its proposals are those of torch, and then compares query by query. What is told of proposals meanwhile is their rank.
        A network that proposes nothing has no choice.
        """
        return nullcontext()

    def detect(self, images: Tensor, content: Tensor | None) -> Queries:
        """Both, one after the other."""
        return self.decode(self.encode(images, content), (images.shape[2], images.shape[3]), content)

    def scores(self, logits: Tensor) -> Tensor:
        """[B,Q,K] -> [B,Q,classes]."""
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)[..., :-1]

    def choose(self, queries: Queries, scores: Tensor) -> Detections:
        """The best `rows` of `scores` [B,Q,classes]; of equals any."""
        classes = scores.shape[2]
        if self.pairs:
            best, index = scores.flatten(1).topk(self.rows)
            chosen = index.div(classes, rounding_mode="trunc")
            found = index - chosen * classes
        else:
            likeliest, labels = scores.max(-1)
            best, chosen = likeliest.topk(self.rows)
            found = labels.gather(1, chosen)
        boxes = _rows(queries.boxes, chosen)
        return Detections(boxes, best, found, None if queries.masks is None else _rows(queries.masks, chosen))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """[B,Q,C] at [B,N] -> [B,N,C]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[2]))
