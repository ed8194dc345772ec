"""The pool works where the scheduler may not be asked for anything."""

import os

import pytest

from app.compute import make_pool


def test_a_sandbox_may_forbid_what_is_only_a_courtesy(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden, raising=False)
    with make_pool(1) as pool:
        assert pool.submit(lambda: 7).result(5) == 7
