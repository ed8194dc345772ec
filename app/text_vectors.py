"""Texts of a request to vectors: cleaned, cut into ids and embedded, and those that came lately are remembered by their content."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from app import metrics
from app.admission import Ticket
from app.errors import InvalidValueError, TooLargeError, VitrineError
from app.manifest import Entry
from app.pipeline import Pipeline
from app.tasks.embed import EmbedResult, EmbedText
from app.text import Phrase, phrase_tokenizer

EMBED_TEXT = EmbedText()
PLACE = "{}"

Key = tuple[str, bytes]
"""Hashes of the files of an engine, and of a text."""


class TextVectors:
    """Embeds texts. The last `capacity` of them are kept; those that were asked for longest ago go first. Event loop only."""

    def __init__(self, pipeline: Pipeline, capacity: int, most: int) -> None:
        """`most`: texts in one request."""
        self.pipeline = pipeline
        self.capacity = capacity
        self.most = most
        self._kept: OrderedDict[Key, EmbedResult] = OrderedDict()

    async def embed(self, model: Entry, texts: Sequence[str], ticket: Ticket, *, field: str) -> list[EmbedResult | VitrineError]:
        """The vector of each text by the model that `model` is an engine of, or the error that this text alone met.

        Raises:
            TooLargeError: more texts than a request may have; `field` is where they came.
            ModelError, BackendError: the model cannot answer.
        """
        if len(texts) > self.most:
            raise TooLargeError(f"{len(texts)} texts in one request; this server takes {self.most}.", field=field)
        named = f"{model.manifest.model}@{model.version}"
        (entry,) = await self.pipeline.acquire(EMBED_TEXT, named, None, ticket)
        files = "".join([file.sha256 for file in entry.manifest.files])
        keys = [(files, hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()) for text in texts]
        found: dict[Key, EmbedResult | VitrineError] = {}
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        metrics.count_texts(len(texts) - len(missing), len(missing))
        if missing:
            made = await self._make(entry, list(missing.values()), ticket, field)
            found |= zip(missing, made, strict=True)
            self._keep({key: one for key, one in zip(missing, made, strict=True) if isinstance(one, EmbedResult)})
        return [found[key] for key in keys]

    async def vectors(
        self, model: Entry, texts: Sequence[str], templates: Sequence[str], ticket: Ticket, *, field: str
    ) -> tuple[NDArray[np.float32], list[int]]:
        """One vector for each text, float32 [texts,D]: the mean, at unit length, of those of the templates with the text put in.

        Returns:
            The vectors, and the numbers of the texts whose end was cut off.

        Raises:
            InvalidValueError: a template without `{}`, a text that cannot be read.
            TooLargeError, ModelError, BackendError: see `embed`.
        """
        if any(PLACE not in template for template in templates):
            raise InvalidValueError("A template needs {} where the label goes, as in 'a photo of a {}'.", field="template")
        every = [template.replace(PLACE, text) for text in texts for template in templates]
        if any(not text.strip() for text in texts):
            raise InvalidValueError("One of the texts is empty.", field=field)
        found = await self.embed(model, every, ticket, field=field)
        results = []
        for text, one in zip(every, found, strict=True):
            if not isinstance(one, EmbedResult):
                raise type(one)(f"{text[:100]!r}: {one.detail}", field=one.field) from one
            results.append(one)
        per_text = np.stack([one.vector for one in results]).reshape(len(texts), len(templates), -1)
        cut = np.array([one.truncated for one in results]).reshape(len(texts), len(templates)).any(1)
        return _mean(per_text), np.flatnonzero(cut).tolist()

    async def _make(self, entry: Entry, texts: Sequence[str], ticket: Ticket, field: str) -> list[EmbedResult | VitrineError]:
        phrases = await self.pipeline.compute("parse", ticket, partial(_encode, entry, texts, ticket, field))
        sources = [phrase.input_ids if isinstance(phrase, Phrase) else phrase for phrase in phrases]
        answer = await self.pipeline.run(EMBED_TEXT, [entry], sources, None, ticket)
        made: list[EmbedResult | VitrineError] = []
        for phrase, item in zip(phrases, answer.items, strict=True):
            if item.error is not None:
                made.append(item.error)
            elif isinstance(phrase, Phrase):
                made.append(EmbedResult(item.result, int(phrase.attention_mask.sum()), phrase.truncated))
        return made

    def _keep(self, made: dict[Key, EmbedResult]) -> None:
        self._kept |= made
        evicted = max(0, len(self._kept) - self.capacity)
        for _ in range(evicted):
            self._kept.popitem(last=False)
        metrics.TEXTS_EVICTED.inc(evicted)


def _encode(entry: Entry, texts: Sequence[str], ticket: Ticket, field: str) -> list[Phrase | InvalidValueError]:
    """A thousand long texts take seconds; a request whose time is over does not hold its thread until the last of them."""
    tokenizer = phrase_tokenizer(entry)
    encoded: list[Phrase | InvalidValueError] = []
    for text in texts:
        ticket.check()
        try:
            encoded.append(tokenizer.encode(text))
        except InvalidValueError as error:
            encoded.append(InvalidValueError(error.detail, field=field))
    return encoded


def _mean(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [N,T,D] -> [N,D] of unit length."""
    if vectors.shape[1] == 1:
        return vectors[:, 0]
    mean = vectors.astype(np.float64).mean(1)
    return np.asarray(mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12), np.float32)
