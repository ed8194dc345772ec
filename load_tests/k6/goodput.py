"""The highest rate at which a server still answers in time: the search of `search.py`, measured by k6."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from load_tests.k6.runner import GOAL, Plan, Run, run
from load_tests.k6.search import Search
from load_tests.k6.shots import Shot

OVERHEAD = 7  # seconds around a step: k6 starts, and the last answers are waited for


@dataclass(frozen=True)
class Wanted:
    """A search: steps of `seconds`, `limit` in milliseconds, the first and the highest rate, repeats at the end, steps at most."""

    seconds: float = 20.0
    limit: float = 50.0
    start: float = 50.0
    ceiling: float = 5000.0
    repeats: int = 3
    max_steps: int = 24

    @property
    def minutes(self) -> float:
        """How long it lasts at most."""
        return self.max_steps * (self.seconds + OVERHEAD) / 60


@dataclass(frozen=True)
class Found:
    """The search that was made, and the run behind each of its steps."""

    wanted: Wanted
    search: Search
    runs: list[Run]

    @property
    def rate(self) -> float | None:
        """Requests a second; None where no rate holds."""
        return self.search.holds

    def __str__(self) -> str:
        holds, fails = (self._told(rate) for rate in (self.rate, self.search.fails))
        told = f"Highest rate with {GOAL:.0%} within {self.wanted.limit:g} ms: {holds}; lowest that fails: {fails}."
        if self.search.settled:
            return told
        return f"{told}\nThe {self.wanted.max_steps} steps did not suffice to tell the two to within {self.search.tolerance:.0%}."

    def as_json(self) -> dict[str, Any]:
        steps = [{"rate": step.rate, **asdict(run)} for step, run in zip(self.search.steps, self.runs, strict=True)]
        settled = {"fails": self.search.fails, "settled": self.search.settled}
        return {"rate": self.rate, **settled, "limit": self.wanted.limit, "goal": GOAL, "steps": steps}

    def _told(self, rate: float | None) -> str:
        return "none" if rate is None else f"{rate:.0f}/s ({', '.join(f'{share:.2%}' for share in self.search.shares(rate))})"


def find(sent: Sequence[Shot], wanted: Wanted, each: Callable[[float, Run], None]) -> Found:
    """Search with Poisson arrivals; `each` is told every rate and its run.

    Raises:
        K6Error: k6 could not do its work.
    """
    runs: list[Run] = []

    def measure(rate: float) -> float:
        measured = run(Plan(sent, wanted.seconds, wanted.limit, rate=rate, stages=False))
        runs.append(measured)
        each(rate, measured)
        return measured.within

    search = Search(measure, wanted.start, GOAL, repeats=wanted.repeats, max_steps=wanted.max_steps, ceiling=wanted.ceiling)
    search.run()
    return Found(wanted, search, runs)
