"""The two graphs of a tokenizer: image uint8 [B,H,W,3] -> tokens int32 -> image uint8 [B,H,W,3].

Tokens are [B,h,w], or [B,codebooks,h,w] where there are several codebooks. Each graph holds the effective codes as a constant.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from app.manifest import Preprocessing, TensorSpec
from export.rewrites import rewrite
from export.spec import Fused, Interface, LoadedTokenizer
from export.tokenizer import Tokenizer

_BATCH = 8
_SCORES = 2**26  # bytes of the scores that are there at a time, for a batch of _BATCH


class Search(nn.Module):
    """The code nearest to each latent: float32 [B,P,D] -> int64 [B,P], of one codebook [N,D].

    Of unit vectors the nearest is that of the largest product. Of others it is that of the largest z.c - |c|^2 / 2, which is one
    product as well when a 1 is put behind the latent. The codebook is cut into pieces whose scores fit into _SCORES; the winners of
    all pieces are compared once more. A piece's scores have a single reader, so that a runtime frees them before the next piece.
    """

    def __init__(self, codebook: Tensor, cosine: bool, positions: int) -> None:
        super().__init__()
        self.cosine = cosine
        rows = codebook if cosine else torch.cat([codebook, -codebook.square().sum(1, keepdim=True) / 2], 1)
        self.rows = nn.Buffer(rows)
        self.starts = range(0, len(rows), max(1, _SCORES // (4 * _BATCH * positions)))
        for start, stop in zip(self.starts, (*self.starts[1:], len(rows)), strict=True):
            self.register_buffer(f"piece_{start}", rows[start:stop].T.contiguous())

    def forward(self, latents: Tensor) -> Tensor:
        if not self.cosine:
            latents = torch.cat([latents, torch.ones_like(latents[..., :1])], -1)
        winners = [(latents @ self.get_buffer(f"piece_{start}")).argmax(-1) + start for start in self.starts]
        if len(winners) == 1:
            return winners[0]
        candidates = torch.stack(winners, -1)
        scores = (embedding(candidates, self.rows) * latents.unsqueeze(2)).sum(-1)
        return candidates.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)


class Tokenize(nn.Module):
    """image -> tokens, and the latents float32 [B,K,P,D] that were looked up."""

    def __init__(self, network: Tokenizer, preprocessing: Preprocessing, grid: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.grid = grid
        mean, std = _per_channel(preprocessing)
        self.gain = nn.Buffer((preprocessing.scale / std).float())
        self.offset = nn.Buffer((-mean / std).float())
        positions = grid[0] * grid[1]
        self.searches = nn.ModuleList(Search(codes, network.cosine, positions) for codes in network.codebooks())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float().permute(0, 3, 1, 2)
        latents = self.network.encode(pixels * self.gain + self.offset).flatten(3).transpose(2, 3)
        found = [search(latents[:, index]) for index, search in enumerate(self.searches)]
        tokens = (found[0] if len(found) == 1 else torch.stack(found, 1)).int()
        return tokens.reshape(*tokens.shape[:-1], *self.grid), latents


class Detokenize(nn.Module):
    """tokens -> image: round(clamp) of what the decoder gives."""

    def __init__(self, network: Tokenizer, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.codebooks = nn.Buffer(network.codebooks())
        mean, std = _per_channel(preprocessing)
        self.gain = nn.Buffer((std / preprocessing.scale).float())
        self.offset = nn.Buffer((mean / preprocessing.scale).float())

    def forward(self, tokens: Tensor) -> Tensor:
        if len(self.codebooks) == 1:
            tokens = tokens.unsqueeze(1)
        codes = torch.stack([embedding(tokens[:, index], codebook) for index, codebook in enumerate(self.codebooks)], 1)
        images = self.network.decode(codes.permute(0, 1, 4, 2, 3))
        return (images.float() * self.gain + self.offset).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def fuse_tokenizer(loaded: LoadedTokenizer) -> tuple[Fused, Fused]:
    """The graphs for the roles `tokenize` and `detokenize`; the loaded network stays as it is and is the reference of both."""
    network = loaded.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten, rewrites = rewrite(copy.deepcopy(network, shared))
    assert isinstance(rewritten, Tokenizer)
    image, tokens = _tensors(loaded)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        encoder = Tokenize(rewritten, loaded.preprocessing, loaded.codebook.grid).eval()
        decoder = Detokenize(rewritten, loaded.preprocessing).eval()
    return (
        Fused(encoder, Interface("tokenize", (image,), (tokens,)), network, parameters, rewrites, exact_tail=True),
        Fused(decoder, Interface("detokenize", (tokens,), (image,)), network, parameters, rewrites),
    )


def _tensors(loaded: LoadedTokenizer) -> tuple[TensorSpec, TensorSpec]:
    frame = (loaded.preprocessing.height, loaded.preprocessing.width, 3)
    codebooks = (loaded.codebook.count,) if loaded.codebook.count > 1 else ()
    image = TensorSpec(name="image", dtype="uint8", shape=(-1, *frame))
    return image, TensorSpec(name="tokens", dtype="int32", shape=(-1, *codebooks, *loaded.codebook.grid))


def _per_channel(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64 [1,3,1,1]."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return mean, std
