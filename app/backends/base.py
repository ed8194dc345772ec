"""The protocol of everything that can run an engine."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from app.admission import Ticket
from app.errors import InferenceError
from app.generate import Event, Prompt, Sampling
from app.manifest import Entry

T = TypeVar("T")
Tensors = Mapping[str, NDArray[Any]]


class Backend(Protocol):
    """Runs engines. Tensors are addressed by name; every tensor's first axis is the batch, the same in all of them."""

    name: str

    def refuses(self, entry: Entry) -> str | None:
        """Why this backend can never run `entry` (a TensorRT plan on a CPU, say); None when it can."""

    async def start(self) -> None:
        """Connect or make ready; called once before anything else. Does not fail when a server is away."""

    async def load(self, entry: Entry) -> None:
        """Make `entry` ready for `infer`; doing it twice is harmless.

        Raises:
            BackendUnavailableError: the server does not answer, or does not have the model ready.
            InferenceError: the engine cannot be loaded.
        """

    def check_room(self, entry: Entry) -> None:
        """Called before anything is computed for a request, so that a full server costs nothing.

        Raises:
            CapacityError: the engine's queue is known to be full at this moment.
        """

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        """Run `entry` on [n, ...] inputs and give its outputs, [n, ...] each; any n >= 1, split where the engine needs it.

        Records the stages `queue` (where it can know) and `infer` on the ticket.

        Raises:
            CapacityError: the engine's queue is full.
            DeadlineError: the ticket's time ran out before the answer.
            BackendUnavailableError: the server does not answer.
            InferenceError: the engine failed on this input.
        """

    async def unload(self, entry: Entry) -> None:
        """Forget `entry` and free what it holds."""

    async def fault(self) -> str | None:
        """Why no inference is possible at all right now; None when the backend is well."""

    def troubles(self) -> list[str]:
        """What is wrong at this moment and does not keep it from computing: one server of several that is away, say."""

    async def close(self) -> None:
        """Release everything. The backend is not used afterwards."""


@runtime_checkable
class GeneratingBackend(Protocol):
    """A backend that can also let chat models speak."""

    def generate(self, entry: Entry, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        """The tokens of an answer as they come; `entry` is the model's decoder, loaded. Closing it ends the work.

        Raises:
            CapacityError, InvalidValueError, InferenceError: the model is full, cannot be given this prompt, or failed.
        """


def check_inputs(entry: Entry, inputs: Tensors) -> int:
    """Hold `inputs` against the manifest and give their common number of rows.

    Raises:
        InferenceError: a tensor is missing, unknown, or of another dtype or shape.
    """
    specs = {spec.name: spec for spec in entry.manifest.inputs}
    if specs.keys() != inputs.keys():
        raise InferenceError(f"{entry} takes the tensors {sorted(specs)}, not {sorted(inputs)}.")
    for name, array in inputs.items():
        spec = specs[name]
        fits = array.ndim == len(spec.shape) and all(want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True))
        if array.dtype != spec.dtype or not fits:
            raise InferenceError(f"{entry} takes {name} as {spec.dtype} {list(spec.shape)}, not {array.dtype} {list(array.shape)}.")
    rows = {len(array) for array in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        raise InferenceError(f"The inputs of {entry} have {sorted(rows)} rows; all need the same number, at least one.")
    return rows.pop()


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Run them at once and give their results in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def split(inputs: Tensors, rows: int, size: int) -> list[Tensors]:
    """Cut `rows` rows into pieces of at most `size`."""
    return [{name: array[start : start + size] for name, array in inputs.items()} for start in range(0, rows, size)]


def join(pieces: Sequence[Tensors]) -> dict[str, NDArray[Any]]:
    """Put the outputs of pieces back together, in order."""
    if len(pieces) == 1:
        return dict(pieces[0])
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
