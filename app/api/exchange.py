"""One question to a chat model and what is told of its answer: who answered, when it began, how it ended."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from app import metrics
from app.admission import Ticket
from app.api.chat_schemas import ChatRequest


@dataclass
class Exchange:
    """`outcome` is None until the answer is over; `first` is the time of its first token, of `time.perf_counter()` as `started`."""

    model: str = ""
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outcome: metrics.ChatOutcome | None = None

    def token(self) -> None:
        """One more token, or piece of text where tokens are not told of."""
        if self.first is None:
            self.first = time.perf_counter()
        self.completion_tokens += 1

    def usage(self, prompt_tokens: int, completion_tokens: int) -> None:
        """What was counted by whoever generated."""
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens

    def end(self, outcome: metrics.ChatOutcome) -> None:
        """The first end counts."""
        if self.outcome is None:
            self.outcome = outcome

    def observe(self) -> None:
        """Write to the metrics; nothing for a question that no model was found for."""
        if self.model:
            seconds = time.perf_counter() - self.started
            first = None if self.first is None else self.first - self.started
            tokens = {"prompt": self.prompt_tokens, "completion": self.completion_tokens}
            metrics.observe_chat(self.model, self.outcome or "error", seconds, first, tokens)


@dataclass(frozen=True)
class SentImage:
    """An encoded image and the name of the parameter that it came in."""

    field: str
    content: bytes


@dataclass(frozen=True)
class Question:
    """What a chat model is to answer, within the time of its `ticket`."""

    asked: ChatRequest
    images: tuple[SentImage, ...]
    ticket: Ticket
    exchange: Exchange


class Answerer(Protocol):
    """Whoever answers questions. Both ways raise errors of `app/errors.py`, a stream also in its middle."""

    async def complete(self, question: Question) -> dict[str, Any]:
        """The whole answer, in the shape of OpenAI's `chat.completion`."""

    def stream(self, question: Question) -> AsyncGenerator[bytes]:
        """Server-sent events with pieces of OpenAI's `chat.completion.chunk`, up to `[DONE]`."""
