"""The graph of a grounding network: image uint8 [B,H,W,3], input_ids and attention_mask int64 [B,L] -> box float32 [B,4]."""

import copy

import torch
from torch import Tensor, nn

from app.manifest import Preprocessing, TensorSpec
from export.grounder import Grounder, corners
from export.rewrites import rewrite
from export.spec import Fused, GroundingReference, Interface, LoadedGrounder


class Ground(nn.Module):
    """image, input_ids, attention_mask -> boxes xyxy in shares of the frame, and the logits they are made of."""

    def __init__(self, network: Grounder, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        self.gain = nn.Buffer((preprocessing.scale / std).float())
        self.offset = nn.Buffer((-mean / std).float())

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float().permute(0, 3, 1, 2)
        logits = self.network.locate(pixels * self.gain + self.offset, input_ids, attention_mask)
        return corners(logits.float().sigmoid()), logits


def fuse_grounder(loaded: LoadedGrounder) -> Fused:
    """The graph of the role `ground`; the loaded network stays as it is and is the reference. Boxes are always float32."""
    network = loaded.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten, rewrites = rewrite(copy.deepcopy(network, shared))
    assert isinstance(rewritten, Grounder)
    return Fused(
        graph=Ground(rewritten, loaded.preprocessing).eval(),
        interface=_interface(loaded),
        reference=GroundingReference(network, loaded.vocabulary),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        rewrites=rewrites,
        exact_tail=True,
    )


def _interface(loaded: LoadedGrounder) -> Interface:
    frame = (loaded.preprocessing.height, loaded.preprocessing.width, 3)
    words = (-1, loaded.network.length)
    inputs = (
        TensorSpec(name="image", dtype="uint8", shape=(-1, *frame)),
        TensorSpec(name="input_ids", dtype="int64", shape=words),
        TensorSpec(name="attention_mask", dtype="int64", shape=words),
    )
    return Interface("ground", inputs, (TensorSpec(name="box", dtype="float32", shape=(-1, 4)),))
