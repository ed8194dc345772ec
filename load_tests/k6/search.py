"""The highest rate that a server holds, from measurements that each may be wrong: bracket, bisect, repeat at the end."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One measurement: at `rate` requests a second, `share` (0..1) of them were answered in time."""

    rate: float
    share: float


@dataclass
class Search:
    """Finds the highest rate whose median share reaches `goal`, to within the factor 1 + `tolerance`.

    Doubles from `start` until a rate fails (or halves until one holds), bisects in between, then measures the highest rate that
    holds and the lowest that fails until there are `repeats` of each. Every verdict is the median of all that was measured at
    a rate: where a repeat overturns one, the search goes on from there. `ceiling` is the highest rate tried, `floor` the lowest,
    and there are at most `max_steps` measurements.
    """

    measure: Callable[[float], float]
    start: float = 50.0
    goal: float = 0.99
    tolerance: float = 0.05
    repeats: int = 3
    max_steps: int = 24
    floor: float = 0.5
    ceiling: float = 10_000.0
    steps: list[Step] = field(default_factory=list)

    @property
    def holds(self) -> float | None:
        """The highest rate that holds below every one that fails; None while none does."""
        return max((rate for rate in self._holding if rate < (self.fails or math.inf)), default=None)

    @property
    def fails(self) -> float | None:
        """The lowest rate that fails; None while none does."""
        return min((rate for rate in self._shares if rate not in self._holding), default=None)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to measure, so that `holds` is the answer (None: even `floor` is too much)."""
        return self._next() is None

    def run(self) -> float | None:
        """Measure until settled or out of steps; the rate, or None where none holds."""
        while len(self.steps) < self.max_steps and (rate := self._next()) is not None:
            self.steps.append(Step(rate, self.measure(rate)))
        return self.holds

    def shares(self, rate: float) -> list[float]:
        """What was measured at `rate`, in order."""
        return self._shares[rate]

    @property
    def _shares(self) -> defaultdict[float, list[float]]:
        shares = defaultdict[float, list[float]](list)
        for step in self.steps:
            shares[step.rate].append(step.share)
        return shares

    @property
    def _holding(self) -> set[float]:
        return {rate for rate, shares in self._shares.items() if statistics.median(shares) >= self.goal}

    def _next(self) -> float | None:
        """The rate to measure now; None when all is known."""
        holds, fails = self.holds, self.fails
        if holds is None:
            if fails is None:
                return self.start
            if fails > self.floor:
                return max(fails / 2, self.floor)
        elif fails is None:
            if holds < self.ceiling:
                return min(2 * holds, self.ceiling)
        elif fails > holds * (1 + self.tolerance):
            return math.sqrt(holds * fails)
        return next((rate for rate in (holds, fails) if rate is not None and len(self.shares(rate)) < self.repeats), None)
