"""An engine without an engine: deterministic outputs of the right shape, for tests and gateway-only load tests."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Tensors, check_inputs
from app.errors import BackendUnavailableError, InferenceError
from app.manifest import Entry, TensorSpec


class FakeBackend:
    """Every row's outputs follow from the bytes of its inputs alone. Set `down` to a reason to play a dead server."""

    name = "fake"

    def __init__(self) -> None:
        self.down: str | None = None
        self.loaded: set[tuple[str, int]] = set()
        self.calls: list[int] = []

    def refuses(self, entry: Entry) -> str | None:
        return None

    async def start(self) -> None:
        pass

    async def load(self, entry: Entry) -> None:
        self._check_up()
        self.loaded.add((entry.name, entry.version))

    def check_room(self, entry: Entry) -> None:
        pass

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        self._check_up()
        ticket.check()
        if (entry.name, entry.version) not in self.loaded:
            raise InferenceError(f"{entry} is not loaded.")
        rows = check_inputs(entry, inputs)
        self.calls.append(rows)
        with ticket.stage("infer"):
            seeds = [zlib.crc32(b"".join(array[row].tobytes() for array in inputs.values())) for row in range(rows)]
            return {spec.name: np.stack([_values(spec, seed, entry) for seed in seeds]) for spec in entry.manifest.outputs}

    async def unload(self, entry: Entry) -> None:
        self.loaded.discard((entry.name, entry.version))

    async def fault(self) -> str | None:
        return self.down

    def troubles(self) -> list[str]:
        return []

    async def close(self) -> None:
        self.loaded.clear()

    def _check_up(self) -> None:
        if self.down is not None:
            raise BackendUnavailableError(self.down)


def _values(spec: TensorSpec, seed: int, entry: Entry) -> NDArray[Any]:
    """One row; floats are positive and sum to 1 over the last axis, as probabilities do; tokens are in the codebook,
    classes among the model's."""
    shape = [max(1, size) for size in spec.shape[1:]]
    generator = np.random.default_rng(seed)
    if not spec.dtype.startswith("float"):
        codebook, detection = entry.manifest.codebook, entry.manifest.detection
        highest = codebook.size if codebook is not None and spec.name == "tokens" else 100
        highest = detection.classes if detection is not None and spec.name == "classes" else highest
        return generator.integers(0, highest, shape).astype(spec.dtype)
    values: NDArray[Any] = generator.random(shape) + 1e-3
    values /= values.sum(-1, keepdims=True)
    return values.astype(spec.dtype)
