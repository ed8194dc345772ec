"""API keys: how one is made, how it is written down, and how the one that a client sends is recognised.

What is kept of a key is its SHA-256, in a line such as

    photos sha256:5b1c... 100/minute

A key is 256 random bits, so that nobody can go through what may have been hashed: no slow hash is needed. See decision 17.
"""

import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["client", "monitor", "admin"]
"""What a key is for: tasks and models, the metrics, or everything."""

KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}

PREFIX = "vitrine_"  # known to people and to programs that look for secrets in what is about to be published
MOST_CHARACTERS = 256  # of a key that a client sends
LINE = "NAME sha256:HEX [client|monitor|admin] [RATE]"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_RATE = re.compile(r"[1-9]\d{0,8}/([1-9]\d{0,4})?(second|minute|hour|day)s?")
_LOOKED_UP = 8  # bytes of a digest


@dataclass(frozen=True)
class ApiKey:
    """What is known of one key. `rate` is how many requests it may send, as `limits` reads it: `100/minute`; "" is any number."""

    name: str
    digest: bytes
    kind: Kind = "client"
    rate: str = ""

    def __str__(self) -> str:
        """The line that keeps it."""
        words = [self.name, f"sha256:{self.digest.hex()}", "" if self.kind == "client" else self.kind, self.rate]
        return " ".join(filter(None, words))


def make_key(name: str, kind: Kind = "client", rate: str = "") -> tuple[str, ApiKey]:
    """A new key, which is told once and kept nowhere, and what is known of it from then on.

    Raises:
        ValueError: a name or a rate that a line cannot hold.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    (known,) = parse_keys(str(ApiKey(name, sha256(key.encode()).digest(), kind, rate)))
    return key, known


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of `text`, one on a line or between commas; `#` begins a comment. A key and its successor may have one name.

    Raises:
        ValueError: something that is no such line. It is told by its number and never repeated: it may be a key.
    """
    keys: dict[bytes, ApiKey] = {}
    entries = [entry.split() for line in text.splitlines() for entry in line.partition("#")[0].split(",")]
    for number, words in enumerate(filter(None, entries), 1):
        key = _parse_entry(words)
        if key is None:
            raise ValueError(f"entry {number} is not `{LINE}`; `vitrine key NAME` prints one")
        if key.digest in keys:
            raise ValueError(f"entry {number} is the same key as an earlier one")
        keys[key.digest] = key
    return tuple(keys.values())


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        ValueError: it cannot be read, or has something that is no key's line.
    """
    try:
        return parse_keys(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text") from error


def _parse_entry(words: list[str]) -> ApiKey | None:
    name, digest, *rest = words if len(words) > 1 else (*words, "")
    if not _NAME.fullmatch(name) or (found := _DIGEST.fullmatch(digest)) is None:
        return None
    kinds = [KINDS[word] for word in rest if word in KINDS]
    rates = [word for word in rest if _RATE.fullmatch(word)]
    if len(kinds) > 1 or len(rates) > 1 or len(kinds) + len(rates) < len(rest):
        return None
    return ApiKey(name, bytes.fromhex(found[1]), kinds[0] if kinds else "client", "".join(rates))


class Keyring:
    """Recognises keys, in a microsecond for any number of them."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.digest[:_LOOKED_UP]: key for key in keys}

    def find(self, presented: str) -> ApiKey | None:
        """The key whose digest is that of `presented`; the digests are compared in constant time.

        The time of the look-up tells of the first bytes of a digest at most, which nobody can choose without its key.
        """
        if len(presented) > MOST_CHARACTERS:
            return None
        digest = sha256(presented.encode("utf-8", "surrogateescape")).digest()
        key = self._keys.get(digest[:_LOOKED_UP])
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None
