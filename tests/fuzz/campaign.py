"""What a campaign is: inputs until its time is up, counted by what came of them, and kept where they broke a promise."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOUND = Path(__file__).parents[2] / "build/fuzz"
MOST_FAULTS = 20  # of one campaign; more of them would be the same again
REFUSED_SECONDS = 1.0
SECONDS_PER_MEGAPIXEL = 0.1
SECONDS_PER_MEGABYTE = 0.1


def allowed_seconds(pixels: int, size: int) -> float:
    """Processor time that decoding `pixels` from a file of `size` bytes may take."""
    return REFUSED_SECONDS + SECONDS_PER_MEGAPIXEL * pixels / 1e6 + SECONDS_PER_MEGABYTE * size / 1e6


@dataclass
class Campaign:
    """`seconds` to make inputs in, from `seed`; then what came of them. `good` counts the requests in between that
    must be answered; `slowest` are processor seconds, and of which input.
    """

    name: str
    seconds: float
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    good: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def inputs(self) -> Iterator[tuple[int, random.Random]]:
        """The number of each input and its own source of chance, so that number and seed are enough to make it again."""
        until = time.monotonic() + self.seconds
        number = 0
        while time.monotonic() < until and len(self.faults) < MOST_FAULTS:
            yield number, random.Random(f"{self.name} {self.seed} {number}")
            number += 1

    def count(self, outcome: str, seconds: float = 0.0, name: str = "") -> None:
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, (seconds, name))

    def fault(self, told: str, data: bytes = b"") -> None:
        """A broken promise; `data` is what broke it."""
        kept = ""
        if data:
            FOUND.mkdir(parents=True, exist_ok=True)
            file = FOUND / f"{self.name}-{self.seed}-{len(self.faults)}.bin"
            file.write_bytes(data)
            kept = f" [build/fuzz/{file.name}]"
        self.faults.append(f"{told}{kept}")

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        slowest = f"; slowest {self.slowest[0]:.2f} s of processor time ({self.slowest[1]})" if self.slowest[1] else ""
        lines = [f"{self.name}: {total} inputs, {len(self.faults)} faults: {outcomes}{slowest}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes), *(f"  FAULT {fault}" for fault in self.faults)])
