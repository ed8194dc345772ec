"""Beside decoding and resizing: a phrase becomes the ids that an engine takes, as the `tokenizer.json` beside it says."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from app.clean import cleaner
from app.errors import InvalidValueError
from app.manifest import Entry, ManifestError, Text

MAX_CHARACTERS = 10_000  # beyond it a phrase is not even read; no engine takes as many ids
FIELD = "phrase"


@dataclass(frozen=True)
class Phrase:
    """One phrase for the engine: the tensors' rows, int64 [length] each, and whether words of it were left out."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    truncated: bool


class PhraseTokenizer:
    """The tokenizer of one engine. It keeps nothing of what it reads and may be used by several threads at once."""

    def __init__(self, file: Path, text: Text) -> None:
        """Read `file`.

        Raises:
            ManifestError: it cannot be read, is no tokenizer, or has no token of the padding's id.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ManifestError(f"{file.name} is not a tokenizer that can be read: {error}") from error
        padding = self._tokenizer.id_to_token(text.padding_id)
        if padding is None:
            raise ManifestError(f"{file.name} has no token of the id {text.padding_id}, with which phrases are padded")
        self.text = text
        self._clean = cleaner(text.clean)
        self._tokenizer.enable_padding(length=text.length, pad_id=text.padding_id, pad_token=padding)
        if text.too_long == "truncate":
            self._tokenizer.enable_truncation(text.length)
        else:
            self._tokenizer.no_truncation()

    def encode_together(self, phrases: Sequence[str], field: str) -> NDArray[np.int64]:
        """The ids of several phrases for an engine that looks for them at once, int64 [1,text.phrases,text.length].

        Raises:
            InvalidValueError: see `encode`; there are too many of them.
        """
        places = self.text.phrases or 1
        if len(phrases) > places:
            raise InvalidValueError(f"There are {len(phrases)} different phrases; the model takes {places} at once.", field=field)
        ids = np.zeros((1, places, self.text.length), np.int64)
        for place, phrase in enumerate(phrases):
            ids[0, place] = self.encode(phrase, field).input_ids
        return ids

    def encode(self, phrase: str, field: str = FIELD) -> Phrase:
        """The ids of `phrase`, its special tokens around it and its padding behind it; `field` is the request's.

        Raises:
            InvalidValueError: nothing is left of the phrase (it is empty, blank, or of control characters); it is too long; it has
                half of a surrogate pair.
        """
        if len(phrase) > MAX_CHARACTERS:
            raise InvalidValueError(f"The phrase has {len(phrase)} characters; {MAX_CHARACTERS} are read.", field=field)
        try:
            phrase.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError("The phrase has half of a surrogate pair, which is no character.", field=field) from error
        found = self._tokenizer.encode(self._clean(phrase))
        if all(found.special_tokens_mask):
            raise InvalidValueError("The phrase is empty; say in words what to look for.", field=field)
        ids, mask = np.array(found.ids, np.int64), np.array(found.attention_mask, np.int64)
        if len(ids) > self.text.length:
            raise InvalidValueError(
                f"The phrase makes {len(ids)} tokens, the model takes {self.text.length}, marks of beginning and end included; "
                "say it in fewer words.",
                field=field,
            )
        return Phrase(ids, mask, truncated=bool(found.overflowing))


def phrase_tokenizer(entry: Entry) -> PhraseTokenizer:
    """That of `entry`, read once for each published file.

    Raises:
        ManifestError: the entry takes no phrases, or see `PhraseTokenizer`.
    """
    if entry.manifest.text is None:
        raise ManifestError(f"{entry} takes no phrases")
    return _read(entry.path / entry.manifest.text.tokenizer.file, entry.manifest.text)


@lru_cache(maxsize=32)
def _read(file: Path, text: Text) -> PhraseTokenizer:
    """`text` holds the hash of the file's content."""
    return PhraseTokenizer(file, text)
