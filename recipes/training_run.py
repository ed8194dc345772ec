"""A training run that ends with its time on any machine and goes on where it was interrupted; what the recipes on scenes share."""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


def make_parser(document: str | None, out: Path) -> argparse.ArgumentParser:
    """The options of every recipe on scenes; `document` is the recipe's docstring, `out` where it writes by default."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0] if document else None)
    parser.add_argument("--data", type=Path, default=Path("runs/scenes"), help="where drawn scenes are kept: 4.2 GB for 16,000")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--minutes", type=float, default=60, help="length of the run, evaluations included")
    parser.add_argument("--steps", type=int, default=10**9, help="end after this many steps at the latest")
    parser.add_argument("--evaluate-minutes", type=float, default=5, help="minutes between evaluations, each saves a checkpoint")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Stateful(Protocol):
    """What a checkpoint keeps: a module or an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Run:
    """Counts steps and time, says the learning rate, keeps `folder/checkpoint.pth` and writes `folder/log.jsonl`.

    Args:
        folder: a checkpoint in it is taken up.
        minutes: how long the run takes in all, evaluations and what went before an interruption included.
        every: minutes between reports, each of which saves.
        parts: what a checkpoint keeps, by name.
        steps: end after this many at the latest.
    """

    def __init__(self, folder: Path, *, minutes: float, every: float, parts: Mapping[str, Stateful], steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._parts, self._budget, self._every, self._limit = folder, parts, minutes * 60, every * 60, steps
        self._checkpoint = folder / "checkpoint.pth"
        self._averages: dict[str, float] = {}
        self.step, spent = 0, 0.0
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, spent = state["step"], state["spent"]
        self._began = time.monotonic() - spent
        self._due = spent + self._every

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """0 at the beginning, 1 at the end."""
        return min(self.spent / self._budget, 1.0)

    def rate(self, peak: float) -> float:
        """The learning rate now: a short rise, a plateau until 55 % of the run, then down to 1 % along a cosine."""
        rise = min(0.05 + self.progress / 0.02, 1.0)
        fall = max(self.progress - 0.55, 0.0) / 0.45
        return peak * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to make, until the time is over."""
        while self.progress < 1 and self.step < self._limit:
            yield self.step
            self.step += 1

    def note(self, **values: float) -> None:
        """Keep running averages for the next report."""
        for name, value in values.items():
            self._averages[name] = self._averages.get(name, value) * 0.98 + value * 0.02

    @property
    def is_due(self) -> bool:
        """Whether to evaluate and report after this step."""
        return self.spent >= min(self._due, self._budget) or self.step + 1 >= self._limit

    def report(self, **figures: Any) -> None:
        """Print and log one line of JSON, and save."""
        row = {"step": self.step + 1, "minutes": round(self.spent / 60, 1)}
        row |= {name: round(value, 4) for name, value in self._averages.items()} | figures
        print(json.dumps(row), flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        state = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save(state | {"step": self.step + 1, "spent": self.spent}, self._checkpoint.with_suffix(".tmp"))
        self._checkpoint.with_suffix(".tmp").replace(self._checkpoint)
        self._due = self.spent + self._every
