"""How fast chats are answered: `python -m load_tests.chat`, some minutes.

A random Qwen2.5-VL of some 200 million parameters answers a question about a photo: the gateway over HTTP, streaming, and
transformers' `generate` in process, both greedy, in float32, on all cores. A tiny one of 6 million answers a question without a
photo: by the session calls alone, by the gateway's loop in process and over HTTP. All ways of a model must give the same text.
Rounds are interleaved, each begins at another way. Writes to `load_tests/results`. Nothing else may run on the machine meanwhile.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from load_tests import images
from load_tests.cache import RESULTS
from load_tests.chat import report
from load_tests.chat.answers import BARE, HTTP, LOOP, TRANSFORMERS, Answer, Question, Record, verdicts
from load_tests.chat.loop import Bare, Loop, read
from load_tests.chat.models import LARGE, TINY, repository
from load_tests.chat.peer import Peer
from load_tests.chat.served import Gateway, serve
from load_tests.images import PHOTOS
from load_tests.processes import unwind_on_sigterm
from load_tests.report import interval, word

PHOTO = "500x334"
TEXT = "Describe the person in the photo."
TINY_ANSWERS = 9  # in one measurement, of which the median counts

Way = tuple[str, str, Callable[[], list[Answer]]]
"""Model, way, and one measurement of it."""


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 64,
    trial: Annotated[
        bool, typer.Option("--trial", help="The tiny model alone, against transformers too; nothing is written.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Directory of the report.", show_default="load_tests/results")] = RESULTS,
) -> None:
    unwind_on_sigterm()
    images.make_all()
    for model in (TINY,) if trial else (TINY, LARGE):
        model.make()
    with serve(repository()) as gateway:
        ways = [*_tiny(gateway, tokens), *_against_transformers(gateway, tokens, trial=trial)]
        agree(ways, tokens)
        records = list(measure(ways, rounds))
    for each in verdicts(records):
        print(f"{each.work}: {interval(each.estimate)}, {each.goal}: {word(each)}")
    if not trial:
        command = f"python -m load_tests.chat --rounds {rounds} --tokens {tokens}"
        for file in report.write(records, report.about(command), output):
            print(file)


def _tiny(gateway: Gateway, tokens: int) -> list[Way]:
    entry, question = TINY.entry, Question(TEXT)
    prompt, loop = read(entry, question), Loop(entry)
    loop.ask(prompt, tokens)
    bare = Bare(entry, prompt, loop)
    asks: dict[str, Callable[[], Answer]] = {
        BARE: bare.ask,
        LOOP: lambda: loop.ask(prompt, tokens),
        HTTP: lambda: gateway.ask(TINY.name, question, tokens),
    }
    return [(TINY.name, way, _repeated(ask)) for way, ask in asks.items()]


def _repeated(ask: Callable[[], Answer]) -> Callable[[], list[Answer]]:
    return lambda: [ask() for _ in range(TINY_ANSWERS)]


def _against_transformers(gateway: Gateway, tokens: int, *, trial: bool) -> list[Way]:
    model, question = TINY if trial else LARGE, Question(TEXT, PHOTOS[PHOTO].path.read_bytes())
    name, peer = f"{model.name}, photo" if trial else model.name, Peer(model.network())
    return [
        (name, HTTP, lambda: [gateway.ask(model.name, question, tokens)]),
        (name, TRANSFORMERS, lambda: [peer.ask(question, tokens)]),
    ]


def agree(ways: Sequence[Way], tokens: int) -> None:
    """Warm up, and see to it that all ways of a model give the same.

    Raises:
        RuntimeError: an answer is shorter than asked for, or another.
    """
    texts: dict[str, str] = {}
    for model, way, measure in ways:
        for answer in measure():
            if answer.tokens != tokens:
                raise RuntimeError(f"{model}, {way}: {answer.tokens} tokens in the place of {tokens}; choose another seed.")
            if texts.setdefault(model, answer.text) != answer.text:
                raise RuntimeError(f"{model}, {way}: {answer.text!r} in the place of {texts[model]!r}.")


def measure(ways: Sequence[Way], rounds: int) -> Iterator[Record]:
    for number in range(1, rounds + 1):
        begin = (number - 1) % len(ways)
        for model, way, measure in (*ways[begin:], *ways[:begin]):
            answers = measure()
            first = 1000 * statistics.median(answer.first for answer in answers)
            rate = statistics.median(answer.rate for answer in answers)
            print(f"round {number}: {model}, {way}: first token {first:.1f} ms, {rate:.1f} tokens/s", flush=True)
            yield Record(model, way, number, first, rate)


if __name__ == "__main__":
    typer.run(main)
