"""Second stage of an export: the network becomes the graph of the engine contract, pixels in, answers out."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from app.manifest import Preprocessing, TensorSpec
from export.compose import compose_classifier
from export.fuse_chat import fuse_chat
from export.fuse_detector import fuse_detector
from export.fuse_dual_encoder import fuse_dual_encoder
from export.fuse_grounder import fuse_grounder
from export.fuse_onnx_detector import fuse_onnx_detector
from export.fuse_tokenizer import fuse_tokenizer
from export.onnx_detector import OnnxDetector
from export.onnx_network import OnnxNetwork, count_weights
from export.rewrites import rewrite
from export.spec import (
    Activation,
    AnyLoaded,
    ExportError,
    Fused,
    Interface,
    Loaded,
    LoadedChat,
    LoadedDetector,
    LoadedDualEncoder,
    LoadedGrounder,
    LoadedTokenizer,
    Reference,
)


class Classifier(nn.Module):
    """image uint8 [B,H,W,3] -> probabilities float32 [B,C].

    The pixels become floats before anything else, because TensorRT takes uint8 nowhere but into a cast.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, activation: Activation) -> None:
        super().__init__()
        self.network = network
        self.activation = activation
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        self.gain = nn.Buffer((preprocessing.scale / std).float())
        self.offset = nn.Buffer((-mean / std).float())

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.float().permute(0, 3, 1, 2)
        logits: Tensor = self.network(pixels * self.gain + self.offset)
        return logits.float().softmax(-1) if self.activation == "softmax" else logits.float().sigmoid()


def fuse(loaded: AnyLoaded) -> tuple[Fused, ...]:
    """The graphs of every engine that the network becomes.

    Raises:
        ExportError: see `fuse_classifier`.
    """
    if isinstance(loaded, LoadedTokenizer):
        return fuse_tokenizer(loaded)
    if isinstance(loaded, LoadedChat):
        return fuse_chat(loaded)
    if isinstance(loaded, LoadedDetector):
        brought = loaded.network if isinstance(loaded.network, OnnxDetector) else None
        return (fuse_detector(loaded) if brought is None else fuse_onnx_detector(loaded, brought),)
    if isinstance(loaded, LoadedDualEncoder):
        return fuse_dual_encoder(loaded)
    return (fuse_grounder(loaded) if isinstance(loaded, LoadedGrounder) else fuse_classifier(loaded),)


def fuse_classifier(loaded: Loaded) -> Fused:
    """uint8 [B,H,W,3] -> probabilities float32 [B,C].

    Put normalisation before and the activation behind the network, and replace what exports badly by exact equivalents.

    The loaded network itself stays as it is and is the reference; the graph shares its weights.

    Raises:
        ExportError: a user's ONNX model cannot be joined to its pre- and postprocessing.
    """
    if isinstance(loaded.network, nn.Module):
        return _fuse_torch(loaded, loaded.network)
    if loaded.onnx is None:
        raise ExportError("Nothing says what the ONNX model's input and output are.")
    graph, rewrites = compose_classifier(loaded.network, loaded.onnx, loaded.preprocessing, loaded.activation)
    reference = partial(OnnxNetwork(loaded.network, loaded.onnx).logits, activation=loaded.activation)
    return Fused(graph, _interface(loaded), reference, parameters=count_weights(loaded.network), rewrites=rewrites)


def _fuse_torch(loaded: Loaded, network: nn.Module) -> Fused:
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten, rewrites = rewrite(copy.deepcopy(network, shared))
    graph = Classifier(rewritten, loaded.preprocessing, loaded.activation).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Fused(graph, _interface(loaded), _reference(network), parameters, rewrites)


def _interface(loaded: Loaded) -> Interface:
    frame = (loaded.preprocessing.height, loaded.preprocessing.width, 3)
    return Interface(
        role="classify",
        inputs=(TensorSpec(name="image", dtype="uint8", shape=(-1, *frame)),),
        outputs=(TensorSpec(name="probabilities", dtype="float32", shape=(-1, loaded.num_classes)),),
    )


def _reference(network: nn.Module) -> Reference:
    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(images)
        return logits.float()

    return run
