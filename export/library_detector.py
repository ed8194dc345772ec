"""A detector of transformers as one of ours: DETR and its kin, RT-DETR and YOLOS."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from export.detector import Detector, Queries

_ROWS = 100  # of pairs of query and class, as transformers' own post-processing of Deformable DETR keeps


class LibraryDetector(Detector):
    """A `...ForObjectDetection`: normalised pixels -> logits, and boxes as centre and size in shares of the image.

    One more logit than there are labels is that of `no object`, and scores are softmaxes; else they are sigmoids. `content`: the
    network takes a mask of the pixels that are no padding. `frame`: height and width of its images.
    """

    def __init__(self, library: Any, *, content: bool, frame: tuple[int, int]) -> None:
        super().__init__()
        self.library = library
        self.content = content
        self.frame = frame
        queries = _count_queries(library.config)
        self.score = "softmax" if _has_no_object(library) else "sigmoid"
        self.rows = queries if self.score == "softmax" else min(_ROWS, queries * library.config.num_labels)

    def encode(self, images: Tensor, content: Tensor | None) -> Tensor:
        """[B,Q,K + 4]: logits and boxes. Padding is 0, as the library's processors leave it."""
        given = {"pixel_values": images}
        if content is not None:
            inside = _inside(images, content)
            given = {"pixel_values": images * inside.unsqueeze(1).float(), "pixel_mask": inside}
        answer = self.library(**given)
        return torch.cat([answer.logits, answer.pred_boxes], -1)

    def decode(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> Queries:
        logits, centre, size = features[..., :-4], features[..., -4:-2], features[..., -2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], -1)
        if content is not None:
            shown = content / torch.tensor(frame, device=content.device)
            corners = corners * shown.flip(1).repeat(1, 2).unsqueeze(1)
        return Queries(logits, corners)


def _inside(images: Tensor, content: Tensor) -> Tensor:
    """int64 [B,H,W]: 1 where a pixel is no padding."""
    rows, columns = (
        torch.arange(size, device=content.device).int() < content[:, axis : axis + 1] for axis, size in enumerate(images.shape[2:])
    )
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).long()


def _count_queries(config: Any) -> int:
    return int(config.num_detection_tokens if hasattr(config, "num_detection_tokens") else config.num_queries)


def _has_no_object(library: Any) -> bool:
    """Whether the layer of the class logits is one wider than there are labels."""
    classes: int = library.config.num_labels
    heads = [module for name, module in library.named_modules() if "class" in name and isinstance(module, nn.Linear)]
    return bool(heads) and heads[-1].out_features == classes + 1


class ProposingDetector(LibraryDetector):
    """RT-DETR: its queries start from the likeliest places of the encoder's maps, and its rows are as many as its queries."""

    proposes = True

    def __init__(self, library: Any, *, frame: tuple[int, int]) -> None:
        super().__init__(library, content=False, frame=frame)
        self.queries = self.rows = _count_queries(library.config)

    def encode(self, images: Tensor, content: Tensor | None) -> Tensor:
        """[B,Q * (K + 4) + S]: logits and boxes of the queries, then all proposals."""
        answer = self.library(pixel_values=images)
        queries = torch.cat([answer.logits, answer.pred_boxes], -1)
        return torch.cat([queries.flatten(1), answer.enc_outputs_class.max(-1).values], 1)

    def decode(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> Queries:
        width = self.library.config.num_labels + 4
        queries, proposals = features[:, : self.queries * width], features[:, self.queries * width :]
        return super().decode(queries.reshape(-1, self.queries, width), frame, content)._replace(proposals=proposals)

    @contextmanager
    def starting_at(self, places: Tensor) -> Iterator[None]:
        def rank(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
            ranks = torch.arange(self.queries, 0, -1, device=output.device).to(output).expand_as(places)
            return torch.zeros_like(output[..., 0]).scatter(1, places, ranks).unsqueeze(-1)

        hook = self.library.model.enc_score_head.register_forward_hook(rank)
        try:
            yield
        finally:
            hook.remove()
