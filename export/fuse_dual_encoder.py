"""The two graphs of a dual encoder: image uint8 [B,H,W,3], or input_ids int64 [B,L] -> embedding float32 [B,D] of unit length."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from app.manifest import Preprocessing, TensorSpec
from export.dual_encoder import DualEncoder
from export.rewrites import rewrite
from export.spec import DualReference, Fused, Interface, LoadedDualEncoder


class EmbedImage(nn.Module):
    """image -> embedding, and the features it is made of, which half precision ends at."""

    def __init__(self, network: DualEncoder, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        self.gain = nn.Buffer((preprocessing.scale / std).float())
        self.offset = nn.Buffer((-mean / std).float())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float().permute(0, 3, 1, 2)
        features = self.network.image_features(pixels * self.gain + self.offset)
        return normalize(features.float(), dim=-1), features


class EmbedText(nn.Module):
    """input_ids -> embedding, and the features it is made of.

    The ids become int32 first: the end of a text is where the highest of them is, and TensorRT finds no maximum of int64.
    """

    def __init__(self, network: DualEncoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.text_features(input_ids.int())
        return normalize(features.float(), dim=-1), features


def fuse_dual_encoder(loaded: LoadedDualEncoder) -> tuple[Fused, Fused]:
    """The graphs for the roles `image` and `text`; the loaded network stays as it is and is the reference of both."""
    network = loaded.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten, rewrites = rewrite(copy.deepcopy(network, shared))
    assert isinstance(rewritten, DualEncoder)
    reference = DualReference(network, loaded.vocabulary)
    total = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim)
    seeing = sum(parameter.numel() for parameter in network.image_tower.parameters())
    image, text = _interfaces(loaded)
    return (
        Fused(EmbedImage(rewritten, loaded.preprocessing).eval(), image, reference, seeing, rewrites, exact_tail=True),
        Fused(EmbedText(rewritten).eval(), text, reference, total - seeing, rewrites, exact_tail=True),
    )


def _interfaces(loaded: LoadedDualEncoder) -> tuple[Interface, Interface]:
    frame = (loaded.preprocessing.height, loaded.preprocessing.width, 3)
    image = TensorSpec(name="image", dtype="uint8", shape=(-1, *frame))
    ids = TensorSpec(name="input_ids", dtype="int64", shape=(-1, loaded.network.length))
    embedding = TensorSpec(name="embedding", dtype="float32", shape=(-1, loaded.embedding.dimensions))
    return Interface("image", (image,), (embedding,)), Interface("text", (ids,), (embedding,))
