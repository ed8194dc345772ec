"""The loop: streams side by side, each with its own cache, its own end and its own choice of tokens."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from app.generate import (
    Architecture,
    Event,
    Generator,
    NoSlotError,
    PreparedImage,
    Prompt,
    PromptError,
    Sampling,
    choose,
    rope_positions,
)
from tests.chat_repository import CHANNELS, END, IMAGE, MAX_LENGTH, NAME, add_chat


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    add_chat(root)
    return root


@pytest.fixture
def generator(repository: Path) -> Generator:
    return Generator.open(repository, NAME, 1, threads=1, max_streams=4)


def ids(*tokens: int) -> Prompt:
    return Prompt(np.array(tokens, np.int64))


def image(level: int, rows: int = 4, columns: int = 6) -> PreparedImage:
    return PreparedImage(np.full((rows * columns, CHANNELS), level, np.uint8), (1, rows, columns))


def run(generator: Generator) -> list[Event]:
    events = []
    while generator.streams:
        events += generator.step()
    return events


def test_an_answer_goes_on_token_by_token(generator: Generator) -> None:
    stream = generator.start(ids(40, 41), Sampling(max_tokens=4))
    events = run(generator)
    assert [(event.token, event.finish) for event in events] == [(42, None), (43, None), (44, None), (45, "length")]
    assert stream.tokens == [42, 43, 44, 45]
    assert stream.finish == "length"


def test_the_cache_has_the_prompt_and_every_token_before(generator: Generator) -> None:
    stream = generator.start(ids(40, 41, 40), Sampling(max_tokens=3))
    run(generator)
    assert stream.logits is not None
    assert stream.logits[[40, 41, 42, 43, 44]].tolist() == [0.25, 0.25, 0.125, 10, 0]  # the second 41 is of the answer


def test_the_token_that_ends_an_answer_is_not_of_it(generator: Generator) -> None:
    generator.start(ids(END - 3), Sampling())
    assert [(event.token, event.finish) for event in run(generator)] == [(END - 2, None), (END - 1, None), (None, "stop")]


def test_the_context_ends_an_answer(generator: Generator) -> None:
    stream = generator.start(ids(*[1] * (MAX_LENGTH - 2)), Sampling(max_tokens=100))
    assert run(generator)[-1].finish == "length"
    assert stream.prompt_tokens + len(stream.tokens) == MAX_LENGTH


def test_four_streams_advance_together(generator: Generator) -> None:
    """The fourth's first token comes before the first's last, and none sees another's cache."""
    alone = []
    for first in (10, 20, 30, 40):
        stream = generator.start(ids(first), Sampling(max_tokens=5))
        run(generator)
        alone.append((stream.tokens, stream.logits))
    streams = [generator.start(ids(first), Sampling(max_tokens=5)) for first in (10, 20, 30, 40)]
    order = [streams.index(event.stream) for event in run(generator)]
    assert order == [0, 1, 2, 3] * 5
    for stream, (tokens, logits) in zip(streams, alone, strict=True):
        assert stream.tokens == tokens
        assert np.array_equal(stream.logits, logits)


def test_a_stream_may_join_and_another_leave_at_any_step(generator: Generator) -> None:
    first = generator.start(ids(10), Sampling(max_tokens=8))
    generator.step()
    second = generator.start(ids(20), Sampling(max_tokens=2))
    generator.step()
    generator.cancel(first)
    assert [event.stream for event in generator.step()] == [second]
    assert first.tokens == [11, 12]
    assert second.tokens == [21, 22]
    assert generator.streams == ()
    generator.cancel(first)


def test_slots_are_counted_and_given_back(generator: Generator) -> None:
    streams = [generator.start(ids(10), Sampling()) for _ in range(4)]
    with pytest.raises(NoSlotError):
        generator.start(ids(10), Sampling())
    generator.cancel(streams[1])
    generator.start(ids(10), Sampling())


def test_images_take_the_place_of_their_tokens(generator: Generator) -> None:
    prompt = Prompt(np.array([IMAGE] * 6, np.int64), (image(100),))
    stream = generator.start(prompt, Sampling(max_tokens=2))
    run(generator)
    assert stream.tokens == [101, 102]
    other = generator.start(
        Prompt(np.array([7, *[IMAGE] * 6, 8, IMAGE], np.int64), (image(100), image(50, 2, 2))), Sampling(max_tokens=1)
    )
    run(generator)
    assert other.tokens == [51]
    assert other.logits is not None
    assert other.logits[100] == 6 / 8


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ids(), "empty"),
        (ids(*[1] * MAX_LENGTH), f"may have {MAX_LENGTH}"),
        (ids(1, IMAGE), "more image tokens"),
        (Prompt(np.array([1]), (image(0),)), "has 6 tokens"),
        (Prompt(np.array([IMAGE] * 5), (image(0),)), "has 6 tokens"),
        (Prompt(np.array([IMAGE] * 7), (image(0),)), "more image tokens"),
        (Prompt(np.array([IMAGE] * 3 + [1] + [IMAGE] * 3), (image(0),)), "has 6 tokens"),
        (Prompt(np.array([IMAGE] * 6), (PreparedImage(image(0).patches, (1, 4, 4)),)), "no grid"),
        (Prompt(np.array([IMAGE] * 6), (PreparedImage(image(0).patches, (1, 3, 8)),)), "no grid"),
        (Prompt(np.array([IMAGE] * 6), (PreparedImage(image(0).patches, (2, 2, 6)),)), "still images"),
    ],
)
def test_what_is_no_prompt_takes_no_slot(generator: Generator, prompt: Prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        generator.start(prompt, Sampling())
    assert generator.streams == ()


def test_a_stream_that_fails_leaves_the_others_alone(generator: Generator, caplog: pytest.LogCaptureFixture) -> None:
    broken = PreparedImage(np.zeros((24, CHANNELS + 1), np.uint8), (1, 4, 6))
    bad = generator.start(Prompt(np.array([IMAGE] * 6, np.int64), (broken,)), Sampling())
    good = generator.start(ids(10), Sampling(max_tokens=1))
    events = {event.stream: event for event in generator.step()}
    assert events[bad].finish == bad.finish == "error"
    assert events[bad].error == "The engine failed on this input; the log says how."
    assert "patches" in caplog.text
    assert good.tokens == [11]
    assert generator.streams == ()


def draws(logits: list[float], count: int = 4000, **sampling: float) -> Counter[int]:
    random = np.random.default_rng(0)
    fixed = Sampling(**{"temperature": 1.0} | sampling)  # type: ignore[arg-type]
    return Counter(choose(np.log(np.array(logits, np.float32)), fixed, random) for _ in range(count))


def test_tokens_are_drawn_by_their_shares() -> None:
    drawn = draws([0.1, 0.2, 0.7])
    assert np.allclose([drawn[token] / 4000 for token in range(3)], [0.1, 0.2, 0.7], atol=0.03)
    hot = draws([0.1, 0.2, 0.7], temperature=2.0)
    shares = np.sqrt([0.1, 0.2, 0.7])
    assert np.allclose([hot[token] / 4000 for token in range(3)], shares / shares.sum(), atol=0.03)


def test_the_first_of_equals_is_taken_at_no_temperature() -> None:
    assert choose(np.array([1, 3, 3], np.float32), Sampling(), np.random.default_rng(0)) == 1


def test_top_k_and_top_p_leave_the_improbable_out() -> None:
    assert set(draws([0.1, 0.2, 0.3, 0.4], top_k=2)) == {2, 3}
    assert set(draws([0.1, 0.2, 0.3, 0.4], top_p=0.6)) == {2, 3}
    assert set(draws([0.1, 0.2, 0.3, 0.4], top_p=0.71)) == {1, 2, 3}
    assert set(draws([0.1, 0.2, 0.3, 0.4], top_p=0.001)) == {3}
    assert set(draws([0.3, 0.3, 0.4], top_k=2)) == {0, 1, 2}  # two are second
    assert set(draws([0.1, 0.2, 0.3, 0.4], top_k=100)) == {0, 1, 2, 3}


@pytest.mark.parametrize("extreme", [-np.inf, 3e38])
def test_extreme_logits_are_no_trouble(extreme: float) -> None:
    logits = np.array([extreme, 0, 0], np.float32)
    assert choose(logits, Sampling(temperature=0.01), np.random.default_rng(0)) in ((1, 2) if extreme < 0 else (0,))


def test_a_seed_repeats_an_answer(generator: Generator) -> None:
    def answer(seed: int | None) -> list[int]:
        stream = generator.start(ids(60), Sampling(max_tokens=20, temperature=20.0, seed=seed))
        run(generator)
        return stream.tokens

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in (1, 2, None, None)}) == 4


def test_positions_of_images_lie_on_their_grid() -> None:
    architecture = make_architecture()
    prompt = Prompt(np.array([5, 6, *[IMAGE] * 6, 7]), (image(0),))
    positions, following = rope_positions(prompt, architecture)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_the_file_needs_nothing_of_the_gateway() -> None:
    """A Python model of Triton imports it by its path."""
    file = Path(Generator.open.__func__.__code__.co_filename)
    source = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('generate', {str(file)!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['generate'] = module; spec.loader.exec_module(module)\n"
        "found = {name.partition('.')[0] for name in sys.modules} & {'app', 'torch', 'pydantic', 'PIL', 'fastapi'}\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-I", "-c", source], check=True)


def make_architecture(**fields: int) -> Architecture:
    known = {
        "max_length": MAX_LENGTH,
        "image_token_id": IMAGE,
        "end_token_ids": (END,),
        "patch_size": 14,
        "merge_size": 2,
        "window_size": 112,
        "vision_head_dim": 8,
        "vision_rope_theta": 10_000.0,
    }
    return Architecture(**known | fields)  # type: ignore[arg-type]
