"""The ways of a tokenizer: what a client sends, what it asks for, and what a right answer is."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from app.manifest import Codebook, Entry, ManifestError, read_entry
from app.token_format import MEDIA_TYPE, TokenGrids, pack, unpack
from load_tests.images import PHOTOS
from load_tests.wrk import BOUNDARY, Body

Way = Literal["tokenize", "detokenize to JPEG", "detokenize to PNG"]
HEADLINE: tuple[Way, ...] = ("tokenize", "detokenize to JPEG")
WAYS: tuple[Way, ...] = (*HEADLINE, "detokenize to PNG")
PHOTO = PHOTOS["500x334"]
NPY = "application/x-npy"
AGREEMENT = 0.99  # share of an answer's tokens that are those computed here; other threads and batches add in another order


@dataclass(frozen=True)
class Tokenizer:
    """A model of a repository in its newest version."""

    name: str
    repository: Path
    tokenize: Entry
    detokenize: Entry

    @property
    def codebook(self) -> Codebook:
        assert self.tokenize.manifest.codebook is not None  # every tokenizer's manifest has one
        return self.tokenize.manifest.codebook

    def entry(self, way: Way) -> Entry:
        return self.tokenize if way == "tokenize" else self.detokenize

    def path(self, way: Way) -> str:
        return f"/v1/{self.entry(way).manifest.role}?model={self.name}"


def find(repository: Path, name: str) -> Tokenizer:
    """The newest version of both of a tokenizer's engines.

    Raises:
        ManifestError: there is none of that name, or it cannot be read.
    """
    entries = []
    for role in ("tokenize", "detokenize"):
        versions = [path for path in (repository / f"{name}.{role}").glob("*") if path.name.isdecimal()]
        if not versions:
            raise ManifestError(f"there is no {name}.{role} in the repository")
        entries.append(read_entry(max(versions, key=lambda path: int(path.name))))
    return Tokenizer(name, repository, *entries)


def request(way: Way, tokens: bytes) -> Body:
    """One image or one grid as a client sends it; `tokens` is a container."""
    if way == "tokenize":
        return Body(PHOTO.content_type, PHOTO.path.read_bytes(), MEDIA_TYPE)
    return Body(MEDIA_TYPE, tokens, "image/jpeg" if way == "detokenize to JPEG" else "image/png")


def batch(way: Way, tokens: bytes, size: int) -> Body:
    """`size` of them in one request: a form of images, or a container of grids, of which the pixels come back."""
    if way == "tokenize":
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{PHOTO.file}"\r\n'
        part = f"{head}Content-Type: {PHOTO.content_type}\r\n\r\n".encode() + PHOTO.path.read_bytes() + b"\r\n"
        return Body(f"multipart/form-data; boundary={BOUNDARY}", size * part + f"--{BOUNDARY}--\r\n".encode(), MEDIA_TYPE)
    one = unpack(tokens)
    return Body(MEDIA_TYPE, pack(TokenGrids(one.tokens.repeat(size, 0), one.codebook, one.size)), NPY)


def check(model: Tokenizer, way: Way, tokens: bytes, answer: bytes) -> None:
    """Hold an answer to `request` against what it must be.

    Raises:
        ValueError: it is something else.
    """
    if way == "tokenize":
        found, expected = unpack(answer), unpack(tokens)
        if found.codebook != expected.codebook or found.tokens.shape != expected.tokens.shape:
            raise ValueError(f"The answer has tokens {found.tokens.shape} of codebook {found.codebook[:8]}.")
        if np.mean(found.tokens == expected.tokens) < AGREEMENT:
            raise ValueError("The answer's tokens are others than the engine gives in this process.")
        return
    image = Image.open(BytesIO(answer))
    frame = model.detokenize.manifest.outputs[0].shape[1:3]
    if (image.height, image.width) != frame or f"detokenize to {image.format}" != way:
        raise ValueError(f"The answer is a {image.format} of {image.width} x {image.height}.")
