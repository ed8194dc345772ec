"""The graph of a detector: image uint8 [B,H,W,3], and `content` where it masks its padding -> the best rows, decoded and chosen."""

import copy

import torch
from torch import Tensor, nn

from app.manifest import DType, Preprocessing, TensorSpec
from export.detector import Detector
from export.phrase_detector import PhraseDetector
from export.rewrites import rewrite
from export.spec import Fused, Interface, LoadedDetector


class _Rows(nn.Module):
    """What comes before and behind a detector: normalised pixels; and boxes, scores, classes [, masks] of the rows, then scores,
    boxes [, masks] of every query [, proposals], and all features."""

    def __init__(self, network: Detector, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.frame = (preprocessing.height, preprocessing.width)
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        self.gain = nn.Buffer((preprocessing.scale / std).float())
        self.offset = nn.Buffer((-mean / std).float())

    def normalise(self, image: Tensor) -> Tensor:
        return image.float().permute(0, 3, 1, 2) * self.gain + self.offset

    def answer(self, features: Tensor, content: Tensor | None) -> tuple[Tensor, ...]:
        queries = self.network.decode(features, self.frame, content)
        scores = self.network.scores(queries.logits)
        chosen = self.network.choose(queries, scores)
        inner = (scores, queries.boxes, queries.masks, queries.proposals, features)
        return tuple(tensor for tensor in (*chosen, *inner) if tensor is not None)


class Detect(_Rows):
    """image, and content where the network asks for it -> rows."""

    def forward(self, image: Tensor, content: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.answer(self.network.encode(self.normalise(image), content), content)


class DetectPhrases(_Rows):
    """image, input_ids int64 [B,P,L] -> rows, whose classes are places of phrases."""

    def forward(self, image: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(self.network, PhraseDetector)
        return self.answer(self.network.encode_with(self.normalise(image), input_ids), None)


def fuse_detector(loaded: LoadedDetector) -> Fused:
    """The graph for the role `detect`; the loaded network stays as it is and is the reference.

    What the engine says of every query is kept under names of its own, so that verification compares queries one by one.
    """
    network = loaded.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten, rewrites = rewrite(copy.deepcopy(network, shared))
    assert isinstance(rewritten, Detector)
    graph = (DetectPhrases if isinstance(rewritten, PhraseDetector) else Detect)(rewritten, loaded.preprocessing).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Fused(graph, detector_interface(loaded), network, parameters, rewrites, exact_tail=True, inner=inner_of(loaded))


def detector_interface(loaded: LoadedDetector) -> Interface:
    """The role `detect`: the inputs and outputs that the manifest's `detection` describes."""
    frame, detection = (loaded.preprocessing.height, loaded.preprocessing.width, 3), loaded.detection
    rows = detection.queries
    content = [_tensor("content", "int32", 2)] if detection.content else []
    text = loaded.text
    words = [] if text is None or text.phrases is None else [_tensor("input_ids", "int64", text.phrases, text.length)]
    masks = [] if detection.masks is None else [_tensor("masks", "float32", rows, detection.masks.count)]
    return Interface(
        role="detect",
        inputs=(_tensor("image", "uint8", *frame), *content, *words),
        outputs=(
            _tensor("boxes", "float32", rows, 4),
            _tensor("scores", "float32", rows),
            _tensor("classes", "int64", rows),
            *masks,
        ),
    )


def inner_of(loaded: LoadedDetector) -> tuple[TensorSpec, ...]:
    """What the engine holds of every query, under these names."""
    detection, queries = loaded.detection, -1
    masks = [] if detection.masks is None else [_tensor("query_masks", "float32", queries, detection.masks.count)]
    scores = _tensor("query_scores", "float32", queries, detection.classes)
    proposals = [_tensor("proposals", "float32", queries)] if loaded.network.proposes else []
    return scores, _tensor("query_boxes", "float32", queries, 4), *masks, *proposals


def _tensor(name: str, dtype: DType, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=(-1, *shape))
