"""Before generation: a conversation and its images become the ids and patches that a chat model's engines take."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from app.errors import InvalidValueError
from app.generate import PreparedImage, Prompt
from app.manifest import Entry, Generation, ManifestError

MAX_ASPECT_RATIO = 200
CHARACTERS_PER_TOKEN = 32  # a text that has more for each token that the model takes is not even read; usual are 4
FIELD = "messages"

Message = Mapping[str, Any]
"""`role` and `content`, a string or parts: `{"type": "text", "text": ...}` and `{"type": "image"}`."""


class ChatPrompts:
    """The chat template and the tokenizer of one model. It keeps nothing of what it reads and may be used by several threads."""

    def __init__(self, tokenizer: Path, generation: Generation) -> None:
        """Read `tokenizer` and the template.

        Raises:
            ManifestError: one of them cannot be read.
        """
        self.generation = generation
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ManifestError(f"{tokenizer.name} is not a tokenizer that can be read: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(generation.chat_template)
        except TemplateError as error:
            raise ManifestError(f"the chat template cannot be read: {error}") from error

    def prompt(self, messages: Sequence[Message], images: Sequence[PreparedImage]) -> Prompt:
        """The conversation with the beginning of an answer; `images` in the order in which the messages show them.

        Raises:
            InvalidValueError: see `render`; far too much text, half of a surrogate pair in it, or the mark of an image.
        """
        text = self.render(messages)
        if len(text) > (most := CHARACTERS_PER_TOKEN * self.generation.max_length):
            raise InvalidValueError(f"The conversation has {len(text)} characters; at most {most} are read.", field=FIELD)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError("A message has half of a surrogate pair, which is no character.", field=FIELD) from error
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        is_image = ids == self.generation.image_token_id
        if is_image.sum() != len(images):
            raise InvalidValueError(
                f"The conversation makes {is_image.sum()} marks of images of {len(images)} images; the mark itself is no text.",
                field=FIELD,
            )
        repeats = np.ones(len(ids), np.int64)
        repeats[is_image] = [len(image.patches) // self.generation.merge_size**2 for image in images]
        return Prompt(np.repeat(ids, repeats), tuple(images))

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model reads it, up to where its answer begins.

        Raises:
            InvalidValueError: the template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)
        except TemplateError as error:
            raise InvalidValueError(f"The model's chat template refuses the messages: {error}", field=FIELD) from error


def chat_prompts(entry: Entry) -> ChatPrompts:
    """That of `entry`, read once for each published file.

    Raises:
        ManifestError: the entry is of no chat model, or see `ChatPrompts`.
    """
    if entry.manifest.generation is None:
        raise ManifestError(f"{entry} is of no chat model")
    return _read(entry.path / entry.manifest.generation.tokenizer.file, entry.manifest.generation)


def prepare_image(image: Image.Image, generation: Generation, max_pixels: int | None = None) -> PreparedImage:
    """Resize an upright RGB `image` near its own size and cut it into patches, those of one token side by side.

    `max_pixels`: a limit below the model's own.

    Raises:
        InvalidValueError: see `fit`.
    """
    height, width = fit(image.height, image.width, generation, max_pixels)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    size, merge = generation.patch_size, generation.merge_size
    rows, columns = height // size, width // size
    blocks = pixels.reshape(rows // merge, merge, size, columns // merge, merge, size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames: NDArray[np.uint8] = np.broadcast_to(
        blocks[:, :, :, :, :, None], (*blocks.shape[:5], generation.temporal_patch_size, size, size)
    )
    return PreparedImage(frames.reshape(rows * columns, -1), (1, rows, columns))


def fit(height: int, width: int, generation: Generation, max_pixels: int | None = None) -> tuple[int, int]:
    """Height and width at which the model sees an image: multiples of a merged patch, the aspect ratio nearly kept.

    `max_pixels`: a limit below the model's own.

    Raises:
        InvalidValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidValueError(
            f"The image has {width}x{height} pixels; one side may be {MAX_ASPECT_RATIO} times the other at most.", field="image"
        )
    side = generation.patch_size * generation.merge_size
    most = min(generation.max_pixels, max_pixels or generation.max_pixels)
    down, across = round(height / side) * side, round(width / side) * side
    if down * across > most:
        shrink = math.sqrt(height * width / most)
        return max(side, math.floor(height / shrink / side) * side), max(side, math.floor(width / shrink / side) * side)
    if down * across < generation.min_pixels:
        grow = math.sqrt(generation.min_pixels / (height * width))
        return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return down, across


@lru_cache(maxsize=32)
def _read(file: Path, generation: Generation) -> ChatPrompts:
    """`generation` holds the hash of the file's content."""
    return ChatPrompts(file, generation)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without Jinja's escaping of HTML, as transformers gives it to templates."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
