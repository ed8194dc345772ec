"""The header `Accept`: which of the forms that a route offers the client wants (RFC 9110, 12.5.1)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True)
class Range:
    """One media range of the header: `type/subtype`, `type/*` or `*/*` with its quality 0 to 1."""

    kind: str
    quality: float

    def specificity(self, media_type: str) -> int:
        """How closely this names `media_type`: 3 exactly, 2 its type, 1 everything, 0 not at all."""
        if self.kind == media_type:
            return 3
        if self.kind == f"{media_type.partition('/')[0]}/*":
            return 2
        return int(self.kind == "*/*")


def choose(accept: str, offers: Sequence[str]) -> str | None:
    """The media type of `offers` that `accept` likes best; None when it takes none of them. An empty header takes everything.

    An offer has the quality of the range that names it most closely. Among offers of one quality the more closely named wins, then
    the one whose range stands first in the header, then the first of the offers.
    """
    ranges = list(_ranges(accept)) or [Range("*/*", 1.0)]

    def liking(offer: str) -> tuple[float, int, int]:
        closest = max(range(len(ranges)), key=lambda index: (ranges[index].specificity(offer), -index))
        specificity = ranges[closest].specificity(offer)
        return (ranges[closest].quality if specificity else 0.0, specificity, -closest)

    best = max(offers, key=liking)
    return best if liking(best)[0] > 0 else None


def _ranges(accept: str) -> Iterator[Range]:
    """A range with a quality that is none is left out; other parameters than `q` are not looked at."""
    for part in accept.lower().split(","):
        kind, *parameters = [piece.strip() for piece in part.split(";")]
        values = dict(parameter.partition("=")[::2] for parameter in parameters)
        quality = values.get("q", "1")
        if kind and QUALITY.fullmatch(quality):
            yield Range(kind, float(quality))
