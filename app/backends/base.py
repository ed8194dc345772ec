"""The protocol of everything that can run an engine."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from app.admission import Ticket
from app.manifest import Entry

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

    async def close(self) -> None:
        """Release everything. The backend is not used afterwards."""
