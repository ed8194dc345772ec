"""What is asked, what came back, and whether it reaches the targets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.chat.models import LARGE, TINY
from load_tests.evaluate import Rounds, Verdict, judge, ratio

HTTP, TRANSFORMERS, LOOP, BARE = "http", "transformers", "loop", "bare"
FASTER = 1.2
OVERHEAD = 1.15


@dataclass(frozen=True)
class Question:
    """Some text, and an encoded photo before it."""

    text: str
    photo: bytes | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        seen = [{"type": "image"}] if self.photo is not None else []
        return [{"role": "user", "content": [*seen, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True)
class Answer:
    """`first` and `last`: seconds from the question to the first token and to the end; `tokens`: how many."""

    first: float
    last: float
    tokens: int
    text: str

    @property
    def rate(self) -> float:
        """Tokens a second behind the first, which the prompt is read for."""
        return (self.tokens - 1) / (self.last - self.first)


@dataclass(frozen=True)
class Record:
    """The median of a round's answers. `first`: ms; `rate`: tokens a second behind the first."""

    model: str
    way: str
    round: int
    first: float
    rate: float


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """The large network against transformers, the tiny one's loop against bare calls."""
    return [
        _faster("first token", _rounds(records, LARGE.name, TRANSFORMERS, _first), _rounds(records, LARGE.name, HTTP, _first)),
        _faster("tokens a second", _rounds(records, LARGE.name, HTTP, _rate), _rounds(records, LARGE.name, TRANSFORMERS, _rate)),
        _overhead(_rounds(records, TINY.name, BARE, _rate), _rounds(records, TINY.name, LOOP, _rate)),
    ]


def rows(records: Iterable[Record], model: str, way: str) -> list[Record]:
    """The rounds of one row."""
    return [each for each in records if (each.model, each.way) == (model, way)]


def _faster(work: str, above: Rounds, below: Rounds) -> Verdict:
    found = ratio(above, below)
    met = None if found is None else judge(found.value, "at least", FASTER)
    return Verdict(f"{LARGE.name}, {work}", f"at least {FASTER:g} x transformers'", found, met)


def _overhead(bare: Rounds, loop: Rounds) -> Verdict:
    found = ratio(bare, loop)
    met = None if found is None else judge(found.value, "at most", OVERHEAD)
    return Verdict(f"{TINY.name}, time of a token in the loop", f"at most {OVERHEAD:g} of bare session calls'", found, met)


def _rounds(records: Sequence[Record], model: str, way: str, figure: Callable[[Record], float]) -> Rounds:
    return {each.round: figure(each) for each in rows(records, model, way)}


def _first(record: Record) -> float:
    return record.first


def _rate(record: Record) -> float:
    return record.rate
