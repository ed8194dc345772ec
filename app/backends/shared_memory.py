"""Memory that the gateway and a Triton on the same machine share: inputs are written there once instead of going through gRPC.

A call borrows a region, writes its inputs and names the region to Triton. Only inputs go this way: what an abandoned call may
still read after its region has gone to the next one is only that call's own, and nobody waits for it.
"""

import asyncio
import logging
import mmap
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIRECTORY = Path("/dev/shm")  # noqa: S108 -- where Linux keeps what `shm_open` names, which is how Triton opens it
SMALLEST = 64 * 1024
MAX_BYTES = 256 * 1024 * 1024
CLOSE_SECONDS = 1.0
AWAY = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED")
UNKNOWN_REGION = "Unable to find shared memory region"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Region:
    """Registered with Triton as `name`; `memory` is uint8 [size]."""

    name: str
    memory: NDArray[np.uint8]

    def write(self, array: NDArray[Any], offset: int) -> None:
        target = self.memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(target, array)


class SharedMemory:
    """Regions of powers of two, made when they are first needed and lent to one call at a time. Event loop only.

    The file of a region is removed as soon as Triton has mapped it: a process that is killed leaves nothing behind.
    """

    def __init__(self, client: Any) -> None:
        """`client` is a `tritonclient.grpc.aio.InferenceServerClient`."""
        self.usable = DIRECTORY.is_dir()
        self._client = client
        self._free: dict[int, list[Region]] = defaultdict(list)
        self._names: set[str] = set()
        self._bytes = 0

    @asynccontextmanager
    async def lend(self, size: int, seconds: float | None) -> AsyncIterator[Region | None]:
        """A region of at least `size` bytes; None when Triton cannot have one now, or not within `seconds`."""
        capacity = max(SMALLEST, 1 << (size - 1).bit_length())
        free = self._free[capacity]
        region = free.pop() if free else await self._make(capacity, seconds)
        try:
            yield region
        finally:
            if region is not None and region.name in self._names:
                free.append(region)

    def forget(self, unknown: Region) -> None:
        """Give up all regions when the server does not know one of them: it is another server. New ones are made for it."""
        if unknown.name in self._names:
            self._drop()

    def _drop(self) -> None:
        self._names.clear()
        self._free.clear()
        self._bytes = 0

    async def close(self) -> None:
        """Let Triton unmap the regions; one that it does not let go of in time does not keep the others."""
        from tritonclient.utils import InferenceServerException  # noqa: PLC0415

        async def unregister(name: str) -> None:
            with suppress(InferenceServerException):
                await self._client.unregister_system_shared_memory(name, client_timeout=CLOSE_SECONDS)

        names = list(self._names)
        self._drop()
        await asyncio.gather(*map(unregister, names))

    async def _make(self, size: int, seconds: float | None) -> Region | None:
        from tritonclient.utils import InferenceServerException  # noqa: PLC0415

        if not self.usable or self._bytes + size > MAX_BYTES:
            return None
        name = f"vitrine-inputs-{uuid.uuid4().hex}"
        self._names.add(name)
        self._bytes += size
        try:
            with _file(name, size) as memory:
                await self._client.register_system_shared_memory(name, f"/{name}", size, client_timeout=seconds)
        except (InferenceServerException, OSError) as error:
            if isinstance(error, OSError) or error.status() not in AWAY:
                self.usable = False
                log.warning("Triton gets its inputs through gRPC, memory cannot be shared with it: %s", error)
            self._discard(name, size)
            return None
        except asyncio.CancelledError:
            self._discard(name, size)
            raise
        return Region(name, memory)

    def _discard(self, name: str, size: int) -> None:
        if name in self._names:  # else all were given up meanwhile
            self._names.discard(name)
            self._bytes -= size


@contextmanager
def _file(name: str, size: int) -> Iterator[NDArray[np.uint8]]:
    """Map a new file of `size` bytes; its name is there inside the block alone, the memory for as long as the array is.

    Raises:
        OSError: there is not so much memory. It is reserved here, as a process that writes to what is not there is killed.
    """
    path = DIRECTORY / name
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        try:
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        yield np.frombuffer(memory, np.uint8)
    finally:
        path.unlink(missing_ok=True)
