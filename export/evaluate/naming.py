"""Which classes of a model the names in the data mean."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from export.evaluate.measuring import EvaluationError, read_bytes

Renaming = Mapping[str, str | list[str] | None]
"""Names of the data to the model's labels that they mean, to several where the model tells more apart, or to None: left out."""


@dataclass(frozen=True)
class Classes:
    """What a model tells apart: `count` classes, with as many `labels` or none."""

    count: int
    labels: tuple[str, ...]

    def called(self, name: str) -> frozenset[int]:
        """The ids of the classes of this label (capitals and `_` for a space do not matter), or else the one of this id."""
        exact = frozenset(number for number, label in enumerate(self.labels) if label == name)
        alike = exact or frozenset(number for number, label in enumerate(self.labels) if _plain(label) == _plain(name))
        if not alike and name.isdecimal() and int(name) < self.count:
            return frozenset((int(name),))
        return alike

    def asked(self, number: int) -> str:
        """How a gateway is asked for this class: by its id, or by its label where the id is the label of any."""
        return self.labels[number] if str(number) in self.labels else str(number)


SHOWN = 8
_RENAMING: TypeAdapter[Renaming] = TypeAdapter(dict[str, str | list[str] | None])


def read_renaming(file: Path) -> Renaming:
    """A JSON object such as `{"sofa": "couch", "dog": ["Chihuahua", "German shepherd"], "lamp": null}`.

    Raises:
        EvaluationError: it cannot be read, or is something else.
    """
    try:
        return _RENAMING.validate_json(read_bytes(file), strict=True)
    except ValidationError as error:
        shape = '{"name in the data": "label of the model", ...}'
        raise EvaluationError(f"{file} is not a JSON object of names, such as {shape}.") from error


def match(names: Sequence[str], classes: Classes, renaming: Renaming, *, model: str, data: Path) -> dict[str, frozenset[int]]:
    """The class ids that each name of the data means.

    Args:
        names: of the categories in the data.
        renaming: what some names mean; those that mean None are missing from the answer.

    Raises:
        EvaluationError: names that mean nothing; the message has all of them, and what they may have meant.
    """
    unknown = [f"{name!r}" for name in renaming if name not in names]
    if unknown:
        raise EvaluationError(f"--map speaks of {_some(unknown)}, and {data} does not; it has {_some(map(repr, names))}.")
    found: dict[str, frozenset[int]] = {}
    missed: list[str] = []
    for name in names:
        meant = renaming.get(name, name)
        if meant is None:
            continue
        wanted = [meant] if isinstance(meant, str) else meant
        ids = {label: classes.called(label) for label in wanted}
        missed += [_missed(name, label, classes.labels) for label in wanted if not ids[label]]
        found[name] = frozenset().union(*ids.values())
    if missed:
        ids_only = f"it has no labels, only ids from 0 to {classes.count - 1}"
        known = f"its labels are {_some(map(repr, classes.labels))}" if classes.labels else ids_only
        raise EvaluationError(
            f"{len(missed)} of the {len(names)} names in {data} mean no class of {model}: {_some(missed)}; {known}. "
            'Name them alike, or say what they mean with --map FILE: {"name in the data": "label of the model", ...}, '
            "null to leave one out."
        )
    if not found:
        raise EvaluationError(f"--map leaves out everything that {data} has.")
    return found


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _missed(name: str, label: str, labels: Sequence[str]) -> str:
    near = difflib.get_close_matches(_plain(label), [_plain(known) for known in labels], 1)
    hint = f" (perhaps {near[0]!r})" if near else ""
    return f"{name!r}{hint}" if name == label else f"{label!r} of --map{hint}"


def _some(texts: Iterable[str]) -> str:
    several = list(texts)
    more = f" and {len(several) - SHOWN} more" if len(several) > SHOWN else ""
    return f"{', '.join(several[:SHOWN])}{more}"
