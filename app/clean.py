"""What open_clip does to a text before its tokenizer reads it: broken Unicode and HTML entities are mended, and the like."""

import html
import string
from collections.abc import Callable
from typing import Literal

Cleaning = Literal["lower", "whitespace", "canonicalize"]
Clean = Callable[[str], str]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaner(kind: Cleaning | None) -> Clean:
    """The cleaning of that name; None leaves a text as it is."""
    return str if kind is None else _CLEANERS[kind]


def mend(text: str) -> str:
    """Undo wrong decodings (mojibake), doubled HTML entities and white space around it all."""
    import ftfy  # noqa: PLC0415 -- a gateway without a dual encoder starts without its tables

    fixed: str = ftfy.fix_text(text)
    return html.unescape(html.unescape(fixed)).strip()


def _whitespace(text: str) -> str:
    return " ".join(mend(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    """Without the punctuation of ASCII, underscores as spaces, in lower case."""
    bare = mend(text).replace("_", " ").translate(_PUNCTUATION).lower()
    return " ".join(bare.split())


_CLEANERS: dict[Cleaning, Clean] = {"lower": _lower, "whitespace": _whitespace, "canonicalize": _canonicalize}
