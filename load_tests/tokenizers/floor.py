"""The floor of a tokenizer: the gateway's own functions around onnxruntime, with no server around them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from app.api.forms import encode_image
from app.token_format import TokenGrids, pack, unpack
from load_tests.peers.classifier import vitrine_decoding
from load_tests.tokenizers.inside import Point
from load_tests.tokenizers.ways import PHOTO, Tokenizer, Way


class Floor:
    """One process's share: decode, resize, infer and pack; or unpack, infer and encode."""

    def __init__(self, model: Tokenizer, ways: Sequence[Way], threads: int, tokens: bytes) -> None:
        """`tokens`: the container that is turned into an image."""
        self.model = model
        self.tokens = tokens
        self.photo = PHOTO.path.read_bytes()
        entries = {str(entry): entry for entry in map(model.entry, ways)}
        self.sessions = {name: _session(str(entry.engine_file), threads) for name, entry in entries.items()}
        self.prepare = vitrine_decoding(model.tokenize.manifest.preprocessing)

    def step(self, point: Point) -> int:
        """Do the work of `point.batch` images."""
        way, batch = point.way, point.batch
        if way == "tokenize":
            frames = np.stack([self.prepare(self.photo) for _ in range(batch)])
            for tokens in self._run(way, "image", frames):
                self._pack(tokens)
            return batch
        shape = self.model.detokenize.manifest.inputs[0].shape[1:]
        grids = np.stack([unpack(self.tokens).tokens.reshape(shape) for _ in range(batch)])
        for pixels in self._run(way, "tokens", grids):
            encode_image(pixels, way.rpartition(" ")[2])
        return batch

    def container(self) -> bytes:
        """The photo's tokens."""
        return self._pack(self._run("tokenize", "image", self.prepare(self.photo)[None])[0])

    def _run(self, way: Way, name: str, inputs: NDArray[Any]) -> NDArray[Any]:
        outputs: list[NDArray[Any]] = self.sessions[str(self.model.entry(way))].run(None, {name: inputs})
        return outputs[0]

    def _pack(self, tokens: NDArray[Any]) -> bytes:
        codebook = self.model.codebook
        return pack(TokenGrids(tokens.reshape(1, codebook.count, *codebook.grid), codebook.id, codebook.size))


def _session(file: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
