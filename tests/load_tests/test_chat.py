"""The benchmark of chats: what it computes, and its ways on a small model that is no network of torch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.manifest import read_entry
from load_tests.chat import answers
from load_tests.chat.__main__ import agree, measure
from load_tests.chat.answers import Answer, Question, Record, verdicts
from load_tests.chat.loop import Bare, Loop, read
from load_tests.chat.models import LARGE, TINY
from load_tests.chat.served import Gateway, serve
from load_tests.processes import ServerError
from tests.chat_repository import NAME, add_chat
from tests.factories import make_jpeg

QUESTION = Question("a")
COUNT = 8


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    add_chat(root)
    return root


@pytest.fixture(scope="module")
def gateway(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRINE_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        with serve(repository) as found:
            yield found


def test_targets_are_judged_by_the_median_of_paired_rounds() -> None:
    records = []
    for number, slow in enumerate((1.0, 2.0, 4.0)):
        records += [
            Record(LARGE.name, answers.HTTP, number, first=100 * slow, rate=30 / slow),
            Record(LARGE.name, answers.TRANSFORMERS, number, first=130 * slow, rate=28 / slow),
            Record(TINY.name, answers.BARE, number, first=1, rate=1000 / slow),
            Record(TINY.name, answers.LOOP, number, first=1, rate=800 / slow),
        ]
    first, rate, loop = verdicts(records)
    assert first.estimate is not None
    assert (first.estimate.value, first.met) == (pytest.approx(1.3), True)
    assert rate.estimate is not None
    assert (rate.estimate.value, rate.met) == (pytest.approx(30 / 28), False)
    assert loop.estimate is not None
    assert (loop.estimate.value, loop.met) == (pytest.approx(1.25), False)


def test_a_trial_is_neither_met_nor_missed() -> None:
    records = [Record(f"{TINY.name}, photo", answers.HTTP, 1, first=1, rate=1)]
    assert {each.met for each in verdicts(records)} == {None}


def test_tokens_a_second_are_those_behind_the_first() -> None:
    assert Answer(first=2.0, last=3.0, tokens=11, text="").rate == 10


def test_bare_calls_compute_what_the_loop_answered(repository: Path) -> None:
    entry = read_entry(repository / f"{NAME}.decoder" / "1")
    prompt, loop = read(entry, QUESTION), Loop(entry, threads=1)
    answered = loop.ask(prompt, COUNT)
    assert answered.tokens == len(loop.tokens) == COUNT
    bare = Bare(entry, prompt, loop)
    for _ in range(2):
        again = bare.ask()
        assert (again.tokens, again.text) == (COUNT, answered.text)
        assert loop.logits is not None
        assert np.array_equal(bare.logits.numpy()[0], loop.logits)


def test_the_gateway_gives_what_the_loop_gives(gateway: Gateway, repository: Path) -> None:
    entry = read_entry(repository / f"{NAME}.decoder" / "1")
    expected = Loop(entry, threads=1).ask(read(entry, QUESTION), COUNT)
    found = gateway.ask(NAME, QUESTION, COUNT)
    assert (found.tokens, found.text) == (COUNT, expected.text)
    assert 0 < found.first < found.last


def test_a_photo_goes_along(gateway: Gateway) -> None:
    assert gateway.ask(NAME, Question("a", make_jpeg(8, 8)), 2).tokens == 2
    with pytest.raises(ServerError, match="415"):
        gateway.ask(NAME, Question("a", b"no photo"), 2)


def test_what_is_no_stream_is_told(gateway: Gateway) -> None:
    with pytest.raises(ServerError, match="404"):
        gateway.ask("another", QUESTION, COUNT)


def test_ways_that_disagree_have_no_figures() -> None:
    right = Answer(0.1, 0.2, COUNT, "abc")

    def way(name: str, answer: Answer) -> tuple[str, str, object]:
        return "m", name, lambda: [answer]

    agree([way("a", right), way("b", right)], COUNT)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="'abd' in the place of 'abc'"):
        agree([way("a", right), way("b", replace(right, text="abd"))], COUNT)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="choose another seed"):
        agree([way("a", replace(right, tokens=3))], COUNT)  # type: ignore[list-item]


def test_rounds_begin_at_another_way_each() -> None:
    order = []

    def way(name: str) -> tuple[str, str, object]:
        def ask() -> list[Answer]:
            order.append(name)
            return [Answer(first, 2.0, 11, "") for first in (1.0, 1.5, 1.9)]

        return "m", name, ask

    records = list(measure([way("a"), way("b"), way("c")], 3))  # type: ignore[list-item]
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert records[0] == Record("m", "a", 1, 1500.0, 20.0)
