"""What torch takes for the same network: the forward pass alone, without decoding, packing or encoding.

The network is built by the exporter's loader from the source that the manifest names, with random weights, which take as long.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from app.token_format import unpack
from export.fuse_tokenizer import Detokenize, Tokenize
from export.load import load
from export.spec import ExportError, ExportRequest, LoadedTokenizer, PreprocessingOverrides
from load_tests.peers.classifier import vitrine_decoding
from load_tests.tokenizers.inside import LAYOUTS, Point
from load_tests.tokenizers.ways import PHOTO, Tokenizer, Way

FORMATS = dict(zip(LAYOUTS, (torch.contiguous_format, torch.channels_last), strict=True))


class Eager:
    """fp32, no gradients. The layers are the network's own, not those that an export replaces them with."""

    def __init__(self, model: Tokenizer, ways: Sequence[Way], threads: int, tokens: bytes) -> None:
        """Raises:
        ExportError: the network cannot be built again.
        """
        torch.set_num_threads(threads)
        loaded = _load(model)
        self.graphs: dict[str, nn.Module] = {
            "tokenize": Tokenize(loaded.network, loaded.preprocessing, loaded.codebook.grid).eval(),
            "detokenize": Detokenize(loaded.network, loaded.preprocessing).eval(),
        }
        self.frame = torch.from_numpy(vitrine_decoding(model.tokenize.manifest.preprocessing)(PHOTO.path.read_bytes()).copy())
        self.grid = torch.from_numpy(unpack(tokens).tokens.reshape(model.detokenize.manifest.inputs[0].shape[1:]).copy())
        self._inputs: dict[Point, Tensor] = {}

    def step(self, point: Point) -> int:
        """Compute `point.batch` images in a memory layout of LAYOUTS."""
        graph = self.graphs[point.way.partition(" ")[0]]
        if point not in self._inputs:
            self._inputs = {point: self._input(point)}
            graph.to(memory_format=FORMATS[point.layout])
        with torch.inference_mode():
            graph(self._inputs[point])
        return point.batch

    def _input(self, point: Point) -> Tensor:
        """uint8 [B,H,W,3], which lies in memory as the network is to get it, or tokens int32 [B,(K,)h,w]."""
        one = self.frame if point.way == "tokenize" else self.grid
        inputs = one.expand(point.batch, *one.shape).contiguous()
        if point.way != "tokenize" or point.layout == "channels_last":
            return inputs
        return inputs.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def _load(model: Tokenizer) -> LoadedTokenizer:
    source, preprocessing = model.tokenize.manifest.source, model.tokenize.manifest.preprocessing
    loaded = load(
        ExportRequest(
            source=source.architecture if source.library == "vitrine" else f"{source.library}/{source.architecture}",
            repository=Path(),
            weights="random",
            model_args=source.arguments,
            preprocessing=PreprocessingOverrides(input_size=(preprocessing.height, preprocessing.width)),
        )
    )
    if not isinstance(loaded, LoadedTokenizer):
        raise ExportError(f"{source.architecture} is no tokenizer.")
    return loaded
