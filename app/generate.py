"""Text from images and text, token by token: three onnxruntime sessions, a cache that stays in the engine, streams side by side.

    generator = Generator.open(repository, "qwen", 1, threads=2, max_streams=4)
    stream = generator.start(Prompt(input_ids, images), Sampling(max_tokens=64))
    while generator.streams:
        for event in generator.step():
            ...

Only numpy and onnxruntime are imported, so that the gateway's engine worker and a Python model of Triton run this same file, with
numpy 1 as with numpy 2. There are no threads in here: one caller owns a `Generator` and calls its methods one after the other.

The three engines of a Qwen2.5-VL (`N` patches of one image, `M = N / merge_size**2` tokens of it, `H` the decoder's width):

    vision   patches uint8 [N,C*T*P*P], cos and sin float32 [N,head], windows int64 [W,K], window_mask bool [W,K],
             places int64 [N] -> image_features float32 [M,H]
    embed    input_ids int64 [B,S] -> inputs_embeds float32 [B,S,H]
    decoder  inputs_embeds float32 [B,S,H], position_ids int64 [B,3,S], past.LAYER.key and past.LAYER.value [B,kv heads,P,head]
             -> logits float32 [B,vocabulary] of the last position, present.LAYER.key and present.LAYER.value [B,kv heads,P+S,head]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Finish = Literal["stop", "length", "error"]
Grid = tuple[int, int, int]

ENGINES = ("vision", "embed", "decoder")


class PromptError(ValueError):
    """A prompt that the model cannot be given; the message is a sentence for the user."""


class NoSlotError(RuntimeError):
    """As many streams are alive as the generator has slots."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when a stream ends.

    `temperature` 0 takes the most probable token (the first of equals). `top_k` 0 and `top_p` 1 leave all tokens in. Without a
    `seed` no two streams are alike. `stop` is kept for the caller, who has the text: it watches for the strings and cancels.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image as the vision engine takes it.

    `patches` uint8 [N,channels*temporal_patch_size*patch_size**2], the patches of one merged token side by side; `grid_thw`: N as
    frames, rows and columns of patches.
    """

    patches: NDArray[np.uint8]
    grid_thw: Grid


@dataclass(frozen=True, eq=False)
class Prompt:
    """`input_ids` int64 [L], with as many image tokens in a run as each of `images` gives, in order."""

    input_ids: NDArray[np.int64]
    images: tuple[PreparedImage, ...] = ()


@dataclass(eq=False)
class Stream:
    """One answer under way. The caller may read all of it and changes nothing."""

    prompt: Prompt
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    _random: np.random.Generator = field(default_factory=np.random.default_rng, repr=False)
    _cache: list[Any] = field(default_factory=list, repr=False)
    _next_position: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.input_ids)


@dataclass(frozen=True, eq=False)
class Event:
    """What one step made of one stream: a `token`, the `finish` of the stream, or both when the token is the last.

    The token that ends an answer (`finish` "stop") is not among the tokens. `error` is a sentence when `finish` is "error".
    """

    stream: Stream
    token: int | None = None
    finish: Finish | None = None
    error: str | None = None


@dataclass(frozen=True)
class Architecture:
    """What the host must know of the network; `generation` of the decoder's manifest. Lengths in tokens, sizes in pixels."""

    max_length: int
    image_token_id: int
    end_token_ids: tuple[int, ...]
    patch_size: int
    merge_size: int
    window_size: int
    vision_head_dim: int
    vision_rope_theta: float

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Architecture":
        """From a `generation` of a manifest, which says more than is needed here."""
        known = {each.name: document[each.name] for each in fields(cls)}
        return cls(**{**known, "end_token_ids": tuple(known["end_token_ids"])})


class Generator:
    """Three engines of one model and the streams that they answer. Not for several threads at once."""

    def __init__(
        self,
        engines: Mapping[str, Path],
        architecture: Architecture,
        *,
        threads: int,
        max_streams: int,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Open `engines`, the files of "vision", "embed" and "decoder". `threads`: of each inference."""
        raise NotImplementedError

    @classmethod
    def open(cls, repository: Path, model: str, version: int, *, threads: int, max_streams: int) -> "Generator":
        """The engines of one published build: `REPOSITORY/MODEL.ROLE/VERSION` of each role."""
        raise NotImplementedError

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those that are alive, oldest first."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        raise NotImplementedError

    def start(self, prompt: Prompt, sampling: Sampling) -> Stream:
        """Take a slot. The prompt itself is read by the next `step`.

        Raises:
            NoSlotError: all slots are taken.
            PromptError: the prompt is empty, leaves no room for an answer, or its image tokens are not those of its images.
        """
        raise NotImplementedError

    def step(self) -> list[Event]:
        """Advance every live stream by one token, oldest first; a new one reads its prompt and gives its first token.

        A stream that fails ends with an event and leaves the others alone. A finished stream has lost its slot.
        """
        raise NotImplementedError

    def cancel(self, stream: Stream) -> None:
        """Forget `stream` and what it holds; harmless when it has ended."""
        raise NotImplementedError
