"""Text from images and text, token by token: three onnxruntime sessions, a cache that stays in the engine, streams side by side.

    generator = Generator.open(repository, "qwen", 1, threads=2, max_streams=4)
    stream = generator.start(Prompt(input_ids, images), Sampling(max_tokens=64))
    while generator.streams:
        for event in generator.step():
            ...

Only numpy and onnxruntime are imported, so that the gateway's engine worker and a Python model of Triton run this same file, with
numpy 1 as with numpy 2. There are no threads in here: one caller owns a `Generator` and calls its methods one after the other.

The three engines of a Qwen2.5-VL (`N` patches of one image, `M = N / merge_size**2` tokens of it, `H` the decoder's width):

    vision   patches uint8 [N,C*T*P*P], cos and sin float32 [N,head], windows int64 [W,K], lengths int64 [W],
             places int64 [N] -> image_features float32 [M,H]
    embed    input_ids int64 [B,S] -> inputs_embeds float32 [B,S,H]
    decoder  inputs_embeds float32 [B,S,H], position_ids int64 [B,3,S], past.LAYER.key and past.LAYER.value [B,kv heads,P,head]
             -> logits float32 [B,vocabulary] of the last position, present.LAYER.key and present.LAYER.value [B,kv heads,P+S,head]
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

log = logging.getLogger("vitrine.generate")

Finish = Literal["stop", "length", "error"]
Grid = tuple[int, int, int]

ENGINES = ("vision", "embed", "decoder")
HOST = "decoder"
"""The one of them whose entry stands for all three."""


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
    """One answer under way: its `tokens` so far, and the `logits` float32 [vocabulary] that the last of them was chosen by.

    The caller may read all of it and changes nothing.
    """

    prompt: Prompt
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    logits: NDArray[np.float32] | None = field(default=None, repr=False)

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
    """What the host must know of the network: part of `generation` in the manifest. Lengths in tokens, sizes in pixels."""

    max_length: int
    image_token_id: int
    end_token_ids: tuple[int, ...]
    patch_size: int
    merge_size: int
    window_size: int
    vision_head_dim: int
    vision_rope_theta: float

    @classmethod
    def read(cls, generation: Mapping[str, Any]) -> "Architecture":
        """From the `generation` of a manifest, which says more than is needed here."""
        known = {each.name: generation[each.name] for each in fields(cls)}
        return cls(**{**known, "end_token_ids": tuple(known["end_token_ids"])})

    def image_tokens(self, grid: Grid) -> int:
        """How many tokens of the prompt an image of `grid` fills."""
        frames, rows, columns = grid
        return frames * rows * columns // self.merge_size**2


@dataclass(eq=False)
class _State:
    """What a slot holds: positions int64 [3,L] of the prompt, and the engine's own cache. Of the step that comes next, written
    over by each: `token` int64 [1,1], which was chosen last, and its `place` int64 [1,3,1]."""

    positions: NDArray[np.int64]
    place: NDArray[np.int64]
    random: np.random.Generator
    cache: list[Any]
    token: NDArray[np.int64] = field(default_factory=lambda: np.empty((1, 1), np.int64))


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
        self.architecture = architecture
        self.max_streams = max_streams
        self._vision = open_session(engines["vision"], threads, providers)
        self._embed = open_session(engines["embed"], 1, providers)
        self._decoder = open_session(engines["decoder"], threads, providers)
        self._device = "cpu" if providers[0] == "CPUExecutionProvider" else "cuda"
        self._slots: dict[Stream, _State] = {}

    @classmethod
    def open(
        cls,
        repository: Path,
        model: str,
        version: int,
        *,
        threads: int,
        max_streams: int,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> "Generator":
        """The engines of one published build: `REPOSITORY/MODEL.ROLE/VERSION` of each role."""
        directories = {role: repository / f"{model}.{role}" / str(version) for role in ENGINES}
        manifests = {role: json.loads((path / "manifest.json").read_bytes()) for role, path in directories.items()}
        engines = {role: path / manifests[role]["engine"]["file"] for role, path in directories.items()}
        architecture = Architecture.read(manifests["decoder"]["generation"])
        return cls(engines, architecture, threads=threads, max_streams=max_streams, providers=providers)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those that are alive, oldest first."""
        return tuple(self._slots)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.architecture.max_length

    def start(self, prompt: Prompt, sampling: Sampling) -> Stream:
        """Take a slot. The prompt itself is read by the next `step`.

        Raises:
            NoSlotError: all slots are taken.
            PromptError: the prompt is empty, leaves no room for an answer, or its image tokens are not those of its images.
        """
        if len(self._slots) >= self.max_streams:
            raise NoSlotError(f"All {self.max_streams} streams are taken.")
        length = len(prompt.input_ids)
        if length == 0:
            raise PromptError("The prompt is empty.")
        if length >= self.max_length:
            raise PromptError(f"The prompt has {length} tokens; with its answer it may have {self.max_length}.")
        positions, next_position = rope_positions(prompt, self.architecture)
        stream = Stream(prompt, sampling)
        place = np.full((1, 3, 1), next_position, np.int64)
        self._slots[stream] = _State(positions, place, np.random.default_rng(sampling.seed), self._empty_cache)
        return stream

    def step(self) -> list[Event]:
        """Advance every live stream by one token, oldest first; a new one reads its prompt and gives its first token.

        A stream that fails ends with an event and leaves the others alone. A finished stream has lost its slot.
        """
        events = []
        for stream, state in list(self._slots.items()):
            try:
                event = self._advance(stream, state)
            except ArithmeticError as error:
                event = Event(stream, finish="error", error=f"The engine failed: {error}.")
            except Exception as error:  # onnxruntime raises classes of its own that share no other base
                log.error("an engine failed: %s", error)
                event = Event(stream, finish="error", error="The engine failed on this input; the log says how.")
            if event.finish is not None:
                stream.finish = event.finish
                self.cancel(stream)
            events.append(event)
        return events

    def cancel(self, stream: Stream) -> None:
        """Forget `stream` and what it holds; harmless when it has ended."""
        self._slots.pop(stream, None)

    def _advance(self, stream: Stream, state: _State) -> Event:
        logits = self._continue(stream.tokens[-1], state) if stream.tokens else self._read(stream.prompt, state)
        stream.logits = logits
        token = choose(logits, stream.sampling, state.random)
        if token in self.architecture.end_token_ids:
            return Event(stream, finish="stop")
        stream.tokens.append(token)
        full = stream.prompt_tokens + len(stream.tokens) >= self.max_length
        ended = full or len(stream.tokens) >= stream.sampling.max_tokens
        return Event(stream, token, "length" if ended else None)

    def _read(self, prompt: Prompt, state: _State) -> NDArray[np.float32]:
        """Prefill: the whole prompt at once, its image tokens replaced by what the vision engine makes of the images."""
        embeds = self._embed.run(["inputs_embeds"], {"input_ids": prompt.input_ids[None]})[0]
        if prompt.images:
            features = [self._look(image) for image in prompt.images]
            embeds[0, prompt.input_ids == self.architecture.image_token_id] = np.concatenate(features)
        return self._decode(embeds, state.positions[None], state)

    def _look(self, image: PreparedImage) -> NDArray[np.float32]:
        """The features of one image, float32 [M,H]."""
        inputs = {"patches": image.patches, **vision_inputs(image.grid_thw, self.architecture)}
        features: NDArray[np.float32] = self._vision.run(["image_features"], inputs)[0]
        return features

    def _continue(self, token: int, state: _State) -> NDArray[np.float32]:
        """One step of decoding: the token chosen last, behind all that the cache has."""
        state.token[0, 0] = token
        embeds = self._embed.run(["inputs_embeds"], {"input_ids": state.token})[0]
        logits = self._decode(embeds, state.place, state)
        state.place += 1
        return logits

    def _decode(self, embeds: NDArray[Any], positions: NDArray[np.int64], state: _State) -> NDArray[np.float32]:
        """Logits [vocabulary] behind the last of `embeds`; the engine's new cache, which stays where it is, replaces the old."""
        binding = self._decoder.io_binding()
        binding.bind_cpu_input("inputs_embeds", embeds)
        binding.bind_cpu_input("position_ids", positions)
        for name, value in zip(self._past, state.cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name in self._present:
            binding.bind_output(name, self._device)
        self._decoder.run_with_iobinding(binding)
        logits, *state.cache = binding.get_outputs()
        last: NDArray[np.float32] = logits.numpy()[0]
        if math.isnan(last[last.argmax()]):  # the first that is no number is taken for the largest
            raise ArithmeticError("its logits are no numbers")
        return last

    @cached_property
    def _past(self) -> list[str]:
        return [each.name for each in self._decoder.get_inputs() if each.name.startswith("past.")]

    @cached_property
    def _present(self) -> list[str]:
        return [name.replace("past.", "present.", 1) for name in self._past]

    @cached_property
    def _empty_cache(self) -> list[Any]:
        """A cache of no tokens, shared by all that begin."""
        shapes = {each.name: (each.shape, each.type) for each in self._decoder.get_inputs()}
        empty = []
        for name in self._past:
            (_, heads, _, width), kind = shapes[name]
            array = np.zeros((1, heads, 0, width), np.float16 if kind == "tensor(float16)" else np.float32)
            empty.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        return empty


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token by `logits` [vocabulary]: temperature, then `top_k`, then `top_p`, as transformers orders them.

    Of equals at the edge of `top_k` all stay in. `top_p` keeps the fewest most probable tokens that have that share together.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    if 0 < sampling.top_k < len(scores):
        order = order[: np.searchsorted(-scores, -scores[sampling.top_k - 1], side="right")]
        scores = scores[: len(order)]
    shares = np.exp(scores - scores[0])
    reached = np.cumsum(shares / shares.sum())
    if sampling.top_p < 1:
        reached = reached[: 1 + int(np.searchsorted(reached, sampling.top_p, side="left"))]
    drawn = int(np.searchsorted(reached, random.random() * reached[-1], side="right"))
    return int(order[min(drawn, len(reached) - 1)])


def rope_positions(prompt: Prompt, architecture: Architecture) -> tuple[NDArray[np.int64], int]:
    """Positions int64 [3,L] in time, down and across of every token, and the position of the next token.

    Text counts on in all three. An image's tokens lie on their grid from the position after the text before it; the text behind
    goes on after the longer side of the grid.

    Raises:
        PromptError: the image tokens are not those of the images, or patches and grid do not fit.
    """
    ids, merge = prompt.input_ids, architecture.merge_size
    is_image = ids == architecture.image_token_id
    positions = np.empty((3, len(ids)), np.int64)
    index = position = 0
    for number, image in enumerate(prompt.images, 1):
        frames, rows, columns = image.grid_thw
        if frames != 1:
            raise PromptError(f"Image {number} has {frames} frames; only still images are read.")
        if min(image.grid_thw) < 1 or rows % merge or columns % merge or len(image.patches) != frames * rows * columns:
            raise PromptError(
                f"Image {number} has {len(image.patches)} patches, which are no grid of {frames} x {rows} x {columns}."
            )
        grid = np.indices((frames, rows // merge, columns // merge)).reshape(3, -1)
        begin = index + int(is_image[index:].argmax()) if is_image[index:].any() else len(ids)
        end = begin + grid.shape[1]
        if end > len(ids) or not is_image[begin:end].all():
            raise PromptError(f"Image {number} has {grid.shape[1]} tokens, and the prompt has not as many in its place.")
        positions[:, index:begin] = np.arange(position, position + begin - index)
        position += begin - index
        positions[:, begin:end] = grid + position
        position += max(rows, columns) // merge
        index = end
    if is_image[index:].any():
        raise PromptError(f"The prompt has more image tokens than its {len(prompt.images)} images.")
    positions[:, index:] = np.arange(position, position + len(ids) - index)
    return positions, position + len(ids) - index


def vision_inputs(grid: Grid, architecture: Architecture) -> dict[str, NDArray[Any]]:
    """What the vision engine takes beside the patches of one image.

    `windows` int64 [W,K]: which patches attend to one another in the layers with windows, each row filled up with patch 0 behind
    its `lengths` int64 [W]; `places` int64 [N]: where each patch lies in the flattened windows; `cos` and `sin` float32
    [N,head]: the rotary table of each patch.
    """
    index, bounds = window_order(grid, architecture)
    unit = architecture.merge_size**2
    patches = (index[:, None] * unit + np.arange(unit)).ravel()
    sizes = np.diff(bounds)
    mask = np.arange(sizes.max()) < sizes[:, None]
    windows = np.zeros(mask.shape, np.int64)
    windows[mask] = patches
    places = np.empty(len(patches), np.int64)
    places[patches] = np.flatnonzero(mask)
    cos, sin = vision_rotary(grid, architecture)
    return {"cos": cos, "sin": sin, "windows": windows, "lengths": sizes, "places": places}


def window_order(grid: Grid, architecture: Architecture) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The merged tokens of an image in the order of their windows, int64 [M], and where in patches each window begins and the last
    one ends, int64 [W+1]. Windows are cut from the upper left; those at the other edges may be smaller."""
    frames, rows, columns = grid[0], grid[1] // architecture.merge_size, grid[2] // architecture.merge_size
    side = architecture.window_size // architecture.merge_size // architecture.patch_size
    frame, row, column = np.indices((frames, rows, columns)).reshape(3, -1)
    across = -(-columns // side)
    window = (frame * -(-rows // side) + row // side) * across + column // side
    sizes = np.bincount(window) * architecture.merge_size**2
    return np.argsort(window, kind="stable"), np.concatenate(([0], np.cumsum(sizes)))


def vision_rotary(grid: Grid, architecture: Architecture) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin float32 [N,head]: a quarter of the angles for the row of a patch, a quarter for its column, both twice."""
    frames, rows, columns = grid
    merge, half = architecture.merge_size, architecture.vision_head_dim // 2
    blocks = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    places = np.tile(blocks.transpose(0, 1, 3, 2, 4).reshape(2, -1), frames)
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1) / np.float32(architecture.vision_rope_theta) ** exponents
    angles = places[..., None].astype(np.float32) * frequencies
    table = np.concatenate((*angles, *angles), axis=-1)
    return np.cos(table), np.sin(table)


def open_session(file: Path, threads: int, providers: Sequence[str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # three pools would take one another's cores
    options.enable_mem_pattern = False  # every step has another length
    options.log_severity_level = 3  # errors; the rest is about the optimiser's own doings
    return onnxruntime.InferenceSession(file, options, providers=list(providers))
