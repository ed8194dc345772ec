"""OWLv2 of transformers as one of our detectors: in place of classes it looks for phrases, several at once.

Minderer, Gritsenko and Houlsby, "Scaling Open-Vocabulary Object Detection", 2023.
The decision is docs/decisions/0013-phrases-in-fixed-places.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.detector import Detector, Queries
from export.grounder import corners
from export.spec import Vocabulary

PLACES = 16
"""Phrases that an engine takes at once; all of them together cost it a few percent of what the image does."""
_ROWS = 300


class PhraseDetector(Detector):
    """An `Owlv2ForObjectDetection`: a query is a patch of the image, and a row a query with its likeliest phrase.

    `encode` looks for the phrases that `ask` was told last, by the library's own forward; `encode_with` for those of each image.
    """

    score = "sigmoid"
    content = False

    def __init__(self, library: Any, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.library = library
        self.vocabulary = vocabulary
        self.length = int(library.config.text_config.max_position_embeddings)
        self.rows = min(_ROWS, library.num_patches_height * library.num_patches_width)
        self.asked = nn.Buffer(torch.zeros((PLACES, self.length), dtype=torch.int64), persistent=False)

    @property
    def pairs(self) -> bool:
        return False

    def ask(self, phrases: Sequence[str]) -> None:
        """What `encode` looks for from now on: at most `PLACES` phrases, with the library's ids."""
        ids, _ = self.vocabulary.rows(phrases, self.length)
        self.asked.zero_()
        self.asked[: len(ids)] = torch.from_numpy(ids)

    def encode(self, images: Tensor, content: Tensor | None) -> Tensor:
        """[B,Q,P + 4]: logits of the phrases, and boxes as centre and size in shares of the frame."""
        last = self.asked.argmax(-1, keepdim=True)
        seen = (torch.arange(self.length, device=images.device) <= last).long()
        answer = self.library(
            input_ids=self.asked.repeat(len(images), 1), pixel_values=images, attention_mask=seen.repeat(len(images), 1)
        )
        return torch.cat([answer.logits, answer.pred_boxes], -1)

    def encode_with(self, images: Tensor, input_ids: Tensor) -> Tensor:
        """As `encode`, of int64 [B,P,L]: a phrase ends with the first of its highest ids, and one that begins with 0 is none.

        The same with exact equivalents where the library's forward exports badly: words attend to those before them alone, so that
        nothing behind a phrase's end can reach it, and no mask of the padding is needed.
        """
        library, head = self.library, self.library.class_head
        ids = input_ids.flatten(0, 1)
        states = library.owlv2.text_model(input_ids=ids).last_hidden_state
        last = ids.float().argmax(-1).view(-1, 1, 1).expand(-1, -1, states.shape[2])
        words = _unit(library.owlv2.text_projection(states.gather(1, last).squeeze(1)))
        words = _unit(words, 1e-6).view(-1, input_ids.shape[1], words.shape[1])
        patches, _ = library.image_embedder(pixel_values=images)
        features = patches.flatten(1, 2)
        alike = _unit(head.dense0(features), 1e-6) @ words.transpose(1, 2)
        logits = (alike + head.logit_shift(features)) * (head.elu(head.logit_scale(features)) + 1)
        given = (input_ids[:, :, 0] > 0).unsqueeze(1)
        logits = torch.where(given, logits, torch.finfo(logits.dtype).min)
        boxes = (library.box_head(features) + library.box_bias).sigmoid()
        return torch.cat([logits, boxes], -1)

    def decode(self, features: Tensor, frame: tuple[int, int], content: Tensor | None) -> Queries:
        return Queries(features[..., :-4], corners(features[..., -4:]))


def _unit(values: Tensor, more: float = 0.0) -> Tensor:
    """[...,D] of length 1."""
    return values / (values.square().sum(-1, keepdim=True).sqrt() + more)
