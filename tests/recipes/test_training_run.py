"""A run ends with its time, resumes where it was, and its learning rate follows the clock."""

import json
from pathlib import Path

import pytest
import torch
import training_run
from torch import nn
from training_run import Run


class Clock:
    """Time that passes when told."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_run, "time", clock)
    return clock


def begin(folder: Path, part: nn.Module, steps: int = 10**9) -> Run:
    return Run(folder, minutes=10, every=2, parts={"model": part}, steps=steps)


def test_it_ends_with_its_time_and_reports_on_the_way(tmp_path: Path, clock: Clock) -> None:
    run, reported = begin(tmp_path, nn.Linear(2, 2)), []
    for step in run.steps():
        clock.now += 30
        run.note(loss=float(step))
        if run.is_due:
            run.report(ap=0.5)
            reported.append(step)
    assert run.step == 20
    assert reported == [3, 7, 11, 15, 19]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert rows[-1]["minutes"] == 10
    assert rows[-1]["ap"] == 0.5


def test_it_resumes_where_it_was_saved(tmp_path: Path, clock: Clock) -> None:
    part = nn.Linear(2, 2)
    run = begin(tmp_path, part)
    for _ in run.steps():
        clock.now += 60
        if run.is_due:
            run.report()
            break
    clock.now += 10_000
    other = nn.Linear(2, 2)
    resumed = begin(tmp_path, other)
    assert torch.equal(other.weight, part.weight)
    assert (resumed.step, resumed.spent) == (2, 120)
    assert next(resumed.steps()) == 2


def test_the_learning_rate_rises_stays_and_falls(tmp_path: Path, clock: Clock) -> None:
    run = begin(tmp_path, nn.Linear(2, 2))
    rates = []
    for second in (0, 3, 12, 60, 300, 450, 600):
        clock.now = 100 + second
        rates.append(run.rate(1.0))
    assert rates[0] < rates[1] < rates[2] == rates[3] == rates[4] == 1
    assert 1 > rates[5] > rates[6] == pytest.approx(0.01)


def test_a_number_of_steps_ends_it_too(tmp_path: Path, clock: Clock) -> None:
    run = begin(tmp_path, nn.Linear(2, 2), steps=3)
    due = [run.is_due for _ in run.steps()]
    assert due == [False, False, True]
