"""Beside generation: tokens that come one by one become pieces of text, until one of the stop strings appears in it.

Only `tokenizers` is imported, so that a Python model of Triton can read this file too.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer. Special tokens are left out of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop`: the text ends before the first of these strings to be complete, wherever tokens begin and end in it."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._pending: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """What can be told now that `token` has come: "" inside a character of several tokens and where a stop string may have
        begun. With the first stop string the stream has `stopped`; nothing more comes of it."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_UNFINISHED):
            return ""
        self._pending = []
        return self._tell(text)

    def finish(self) -> str:
        """What was held back, after the last token. Bytes that make no character become U+FFFD."""
        text = self._tokenizer.decode(self._pending)
        self._pending = []
        told = self._tell(text)
        if not self.stopped:
            told += self._held
        self._held = ""
        return told

    def _tell(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
