"""What every evaluation shares: its outcome, and the way of asking a gateway for many items, a few at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal, TypeVar

from app.ahead import ahead
from app.client import PHOTO_FAULTS, ClientError

REQUESTS = 8
"""Requests in flight."""

T = TypeVar("T")
R = TypeVar("R")


class EvaluationError(Exception):
    """The evaluation cannot begin or go on; the message is one or more sentences that say what to do. Exit code 1."""

    exit_code = 1


class MissingToolError(EvaluationError):
    """A library is not installed. Exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Failure:
    """Why one item has no answer; `code` is the gateway's, or that of `app.client.ClientError`."""

    name: str
    code: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """What came out. `figures` are in 0..1, None where the data cannot tell; `groups` are the same of parts of the data, by name.

    `count` items were asked for. Those among them that failed have no answer, and are counted as ones that found nothing.
    """

    unit: Literal["images", "phrases"]
    count: int
    figures: Mapping[str, float | None]
    failures: Sequence[Failure]
    grouped_by: str = ""
    groups: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Asking:
    """How a gateway is asked: for which model (NAME@VERSION), how many requests at a time, and who hears of each that is done."""

    model: str
    requests: int = REQUESTS
    advance: Callable[[], None] = lambda: None

    def each(
        self,
        ask: Callable[[T], R],
        items: Sequence[T],
        name: Callable[[T], str],
        failures: list[Failure],
        faults: frozenset[str] = PHOTO_FAULTS,
    ) -> Iterator[tuple[T, R | None]]:
        """The items in order, each with its answer, or None for one that failed and is now among the `failures`.

        `faults` are the codes of errors that concern one item alone.

        Raises:
            ClientError: any other error.
        """
        for item, future in ahead(ask, items, self.requests):
            try:
                answer: R | None = future.result()
            except ClientError as error:
                if error.code not in faults:
                    raise
                failures.append(Failure(name(item), error.code, error.detail))
                answer = None
            self.advance()
            yield item, answer


def share(hits: Sequence[bool]) -> float | None:
    """How many of them are true, in 0..1; None of none."""
    return sum(hits) / len(hits) if hits else None


def read_bytes(file: Path) -> bytes:
    """
    Raises:
        EvaluationError: the file cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read: {error.strerror}.") from error


def write(file: Path, text: str) -> None:
    """
    Raises:
        EvaluationError: the file cannot be written.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise EvaluationError(f"{file} cannot be written: {error.strerror}.") from error


def find_images(names: Sequence[str], folder: Path, data: Path) -> None:
    """Check that data speaks of images in `folder`; which of them are missing is seen when they are asked for.

    Raises:
        EvaluationError: a name leads out of the folder, or none of the images is there.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}; --images names the one with the images of {data}.")
    for name in names:
        pure = PurePath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise EvaluationError(f"{data} names the image {name!r}, which is not inside of {folder}.")
    if not any((folder / name).is_file() for name in names):
        raise EvaluationError(f"No image of {data} is in {folder}, such as {names[0]}; --images names the folder that has them.")
