"""A Triton server over gRPC: its dynamic batcher merges calls, this side bounds, splits and checks them."""

import asyncio
import ipaddress
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Tensors, check_inputs, join, split, together
from app.backends.breaker import Breaker
from app.backends.shared_memory import UNKNOWN_REGION, Region, SharedMemory
from app.backends.triton_generation import is_last, read_event, request_tensors
from app.errors import (
    BackendUnavailableError,
    CapacityError,
    DeadlineError,
    InferenceError,
    VitrineError,
)
from app.generate import HOST, Event, Prompt, Sampling, Stream
from app.manifest import DType, Entry, TensorSpec

DATATYPES: dict[DType, str] = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32"}
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted server is found again within a second; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The server is named by hand, often on this machine or in this cluster: a proxy of the environment is not for it.
    ("grpc.enable_http_proxy", 0),
]
LIVENESS_SECONDS = 1.0
ALIGNMENT = 64  # bytes, of tensors that share a region
NOT_SERVED = ("unknown model", "not at ready state", "stopped accepting new inference requests", "Server not ready")
"""What Triton says where it does not serve a model (any more). Inside a stream no status comes with it."""
METADATA_SECONDS = 10.0

_ADDRESS = re.compile(r"(?:(?P<scheme>grpcs?)://)?(?P<target>[^/@\s]+:\d+)/?")

T = TypeVar("T")


class TritonBackend:
    """One gRPC connection for everything; at most `concurrency` inferences in flight, `load_timeout` seconds for a model.

    A server that does not answer is found out by the first calls that fail, and left alone until it answers again: calls are
    refused at once. It is addressed with the explicit version whose manifest was read, so that a newer one never answers in its
    place.
    """

    name = "triton"

    def __init__(
        self, url: str, *, concurrency: int = 64, load_timeout: float = 120.0, shared_memory: Literal["auto", "on", "off"] = "auto"
    ) -> None:
        """`url` is `host:port`, `grpc://host:port` or, with TLS, `grpcs://host:port`.

        With `shared_memory` "on", inputs go through memory that Triton shares, if it can; "auto" tries that on this machine alone.

        Raises:
            ValueError: `url` is none of these.
        """
        self.target, self.secure = parse_url(url)
        self.load_timeout = load_timeout
        self.breaker = Breaker(self.target, self._is_live)
        self._slots = asyncio.Semaphore(concurrency)
        self._loading = asyncio.Lock()
        self._builds: set[tuple[str, str]] = set()  # engines and their builds, asked for once each: a number may come again
        self._shares = shared_memory == "on" or (shared_memory == "auto" and is_here(self.target))
        self._memory: SharedMemory | None = None
        self._client: Any = None

    def refuses(self, entry: Entry) -> str | None:
        return None  # what this server has backends for shows when it loads

    async def start(self) -> None:
        # Imported here: gRPC costs the gateway 0.3 s of its start, and only this backend needs it.
        from tritonclient.grpc import aio  # noqa: PLC0415

        self._client = aio.InferenceServerClient(self.target, ssl=self.secure, channel_args=CHANNEL_OPTIONS)
        if self._shares:
            self._memory = SharedMemory(self._client)

    async def load(self, entry: Entry) -> None:
        chat = entry.manifest.generation is not None
        if chat and entry.manifest.role != HOST:
            return  # the Python model of the host opens it itself
        self._check_circuit()
        with self._suspecting():
            await self._have_ready(entry)
            if not chat:  # else the manifest tells of the engine's tensors, the server of its Python model's
                await self._compare(entry)

    def check_room(self, entry: Entry) -> None:
        """What waits in Triton is not known here; its refusal is that of `infer`."""

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        ticket.check()
        self._check_circuit()
        rows = check_inputs(entry, inputs)
        pieces = split(inputs, rows, entry.manifest.engine.max_batch)
        with self._suspecting():
            if len(pieces) == 1:
                return await self._infer_piece(entry, inputs, ticket)
            return join(await together(self._infer_piece(entry, piece, ticket) for piece in pieces))

    async def generate(self, entry: Entry, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        """The tokens of an answer as they come; `entry` is the model's decoder, loaded. Closing it cancels the work in Triton.

        Raises:
            CapacityError, InvalidValueError: the model is full, or cannot be given this prompt.
            BackendUnavailableError: the server does not answer.
            InferenceError: the model failed.
        """
        self._check_circuit()
        try:
            async with aclosing(self._stream(entry, prompt, sampling)) as events:
                async for event in events:
                    yield event
        except (BackendUnavailableError, asyncio.CancelledError):  # away, or silent until nobody waited any more
            self.breaker.suspect()
            raise

    async def unload(self, entry: Entry) -> None:
        """Nothing is held here; the server keeps the model, which others may be using, until its version policy drops it."""

    async def fault(self) -> str | None:
        if not self.breaker.open and await self._is_live():
            return None
        self.breaker.suspect()
        return f"Triton does not answer at {self.target}"

    def troubles(self) -> list[str]:
        return [f"Triton does not answer at {self.target}"] if self.breaker.open else []

    async def close(self) -> None:
        await self.breaker.close()
        if self._memory is not None:
            await self._memory.close()
        if self._client is not None:
            await self._client.close()

    async def _is_live(self) -> bool:
        try:
            with translation("The liveness check"):
                return bool(await self._client.is_server_live(client_timeout=LIVENESS_SECONDS))
        except VitrineError:
            return False

    def _check_circuit(self) -> None:
        if self.breaker.open:
            raise BackendUnavailableError(f"Triton does not answer at {self.target}; retry later.")

    @contextmanager
    def _suspecting(self) -> Iterator[None]:
        """A server that is away in here, or silent until time ran out, may be dead."""
        try:
            yield
        except (BackendUnavailableError, DeadlineError):
            self.breaker.suspect()
            raise

    async def _infer_piece(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        """Answer at most `max_batch` rows.

        NVIDIA's backends fail every call of a merged batch for what is wrong with one. Where that may be what happened, the
        call is repeated once, filled up to `max_batch` rows: to a full batch Triton adds nobody else's.
        """
        rows = len(inputs[entry.manifest.inputs[0].name])
        async with self._slot(ticket):
            try:
                return await self._call(entry, inputs, ticket)
            except InferenceError as error:
                if rows == entry.manifest.engine.max_batch or blames_the_call(error) or not ticket.live:
                    raise
            outputs = await self._call(entry, fill(inputs, entry.manifest.engine.max_batch), ticket)
        return {name: array[:rows] for name, array in outputs.items()}

    async def _call(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        """Ask once; through shared memory where it can be, through gRPC when a restarted server knows nothing of it."""
        arrays = {spec.name: inputs[spec.name] for spec in entry.manifest.inputs}
        rows = len(arrays[entry.manifest.inputs[0].name])
        with ticket.stage("infer"):
            result = None
            async with self._lent(arrays, ticket) as region:
                if region is not None:
                    result = await self._send_shared(entry, arrays, region, ticket)
            if result is None:
                result = await self._send(
                    entry, [_tensor(name, array).set_data_from_numpy(array) for name, array in arrays.items()], ticket
                )
        return {spec.name: take_output(result, spec, rows, entry) for spec in entry.manifest.outputs}

    @asynccontextmanager
    async def _lent(self, arrays: Tensors, ticket: Ticket) -> AsyncIterator[Region | None]:
        if self._memory is None:
            yield None
            return
        async with self._memory.lend(sum(_aligned(array.nbytes) for array in arrays.values()), _seconds_left(ticket)) as region:
            yield region

    async def _send_shared(self, entry: Entry, arrays: Tensors, region: Region, ticket: Ticket) -> Any:
        """Triton's answer, or None when it does not know the region."""
        tensors = []
        offset = 0
        for name, array in arrays.items():
            region.write(array, offset)
            tensors.append(_tensor(name, array).set_shared_memory(region.name, array.nbytes, offset))
            offset += _aligned(array.nbytes)
        try:
            return await self._send(entry, tensors, ticket)
        except VitrineError as error:
            if self._memory is None or UNKNOWN_REGION not in str(error.__cause__):
                raise
            self._memory.forget(region)
            return None

    async def _send(self, entry: Entry, tensors: list[Any], ticket: Ticket) -> Any:
        with translation(str(entry)):
            return await self._client.infer(
                entry.name,
                tensors,
                str(entry.version),
                request_id=ticket.id,
                client_timeout=_seconds_left(ticket),
                headers=ticket.context,
            )

    @asynccontextmanager
    async def _slot(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for one of the `concurrency` places; nobody computes for a ticket that has departed meanwhile."""
        with ticket.stage("queue"):
            try:
                async with asyncio.timeout(_seconds_left(ticket)):
                    await self._slots.acquire()
            except TimeoutError as error:
                raise DeadlineError("The request's time ran out while it waited for the engine; retry later.") from error
        try:
            if not ticket.live:
                raise DeadlineError("The request's time ran out, or its client left, before the engine was free.")
            self._check_circuit()
            yield
        finally:
            self._slots.release()

    async def _stream(self, entry: Entry, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Event]:
        stream = Stream(prompt, sampling)
        tensors = [_tensor(name, array).set_data_from_numpy(array) for name, array in request_tensors(prompt, sampling).items()]

        async def ask() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": entry.name, "inputs": tensors, "model_version": str(entry.version)}

        last: Any = None
        with translation(str(entry)), _stream_translation(str(entry)):
            answers = self._client.stream_infer(ask())
            try:
                async for result, error in answers:
                    if error is not None:
                        raise error
                    if is_last(result):
                        last = result  # the call is over in a moment, by itself
                    else:
                        yield read_event(result, stream, str(entry))
            finally:
                if last is None:
                    answers.cancel()
        if last is None:
            raise InferenceError(f"Triton ended an answer of {entry} before its end.")
        yield read_event(last, stream, str(entry))

    async def _is_ready(self, entry: Entry) -> bool:
        with translation(str(entry)):
            return bool(await self._client.is_model_ready(entry.name, str(entry.version), client_timeout=METADATA_SECONDS))

    async def _have_ready(self, entry: Entry) -> None:
        """Have the server load the version unless it is ready and of this build; one load at a time."""
        build = entry.name, entry.manifest.build
        async with self._loading:
            ready = await self._is_ready(entry)
            if not ready or build not in self._builds:
                try:
                    await self._ask_to_load(entry)
                except VitrineError:
                    if not ready:
                        raise
            self._builds.add(build)

    async def _compare(self, entry: Entry) -> None:
        """Hold the tensors that the server has against those of the manifest."""
        with translation(str(entry)):
            told = await self._client.get_model_metadata(entry.name, str(entry.version), client_timeout=METADATA_SECONDS)
        check_tensors(entry, "inputs", told.inputs, entry.manifest.inputs)
        check_tensors(entry, "outputs", told.outputs, entry.manifest.outputs)

    async def _ask_to_load(self, entry: Entry) -> None:
        """Ask for the newest versions of the model; the ones that are ready go on answering.

        Raises:
            BackendUnavailableError: the server does not answer, or has no such version even now.
            InferenceError: the server cannot load the engine.
        """
        with translation(str(entry)):
            await self._client.load_model(entry.name, client_timeout=self.load_timeout)
        if not await self._is_ready(entry):
            raise BackendUnavailableError(f"Triton does not have {entry} ready; is it the repository that the gateway reads?")


def parse_url(url: str) -> tuple[str, bool]:
    """Give (`host:port`, whether over TLS).

    Raises:
        ValueError: not `host:port`, `grpc://host:port` or `grpcs://host:port`.
    """
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise ValueError(f"{url!r} is not the address of a Triton gRPC endpoint; write host:port, as in localhost:8001")
    return match["target"], match["scheme"] == "grpcs"


def is_here(target: str) -> bool:
    """Whether `host:port` names this machine by its loopback interface."""
    host = target.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_tensors(entry: Entry, what: str, told: Iterable[Any], said: Iterable[TensorSpec]) -> None:
    """Hold the tensors that the server told of (name, datatype, shape) against those of the manifest.

    Raises:
        InferenceError: they differ.
    """
    have = sorted((tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in told)
    want = sorted((spec.name, DATATYPES[spec.dtype], spec.shape) for spec in said)
    if have != want:
        raise InferenceError(
            f"Triton serves {entry} with the {what} {_listed(have)}, its manifest says {_listed(want)}; "
            "publish changed tensors under a new model name."
        )


def take_output(result: Any, spec: TensorSpec, rows: int, entry: Entry) -> NDArray[Any]:
    """The output `spec` of Triton's answer, [rows, ...].

    Raises:
        InferenceError: it is missing, empty, or of another dtype or shape; a server can answer that without an error.
    """
    try:
        array = result.as_numpy(spec.name)
    except ValueError as error:
        raise InferenceError(f"Triton answered {spec.name} of {entry} with another number of bytes than its shape has.") from error
    if array is None:
        raise InferenceError(f"Triton answered without {spec.name} of {entry}.")
    want = (rows, *spec.shape[1:])
    fits = array.ndim == len(want) and all(size in (-1, have) for size, have in zip(want, array.shape, strict=True))
    if array.dtype != spec.dtype or not fits:
        raise InferenceError(
            f"Triton answered {spec.name} of {entry} as {array.dtype} {list(array.shape)}, not {spec.dtype} {list(want)}."
        )
    return array  # type: ignore[no-any-return]


@contextmanager
def translation(what: str) -> Iterator[None]:
    """Turn the errors of `tritonclient` into those of `app.errors`; `what` names the model."""
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415

    try:
        yield
    except InferenceServerException as error:
        raise translate(error.status() or "", error.message() or "", what) from error


@contextmanager
def _stream_translation(what: str) -> Iterator[None]:
    """`translation` of what `tritonclient` lets through of gRPC's own errors while it iterates."""
    from grpc.aio import AioRpcError  # noqa: PLC0415

    try:
        yield
    except AioRpcError as error:
        raise translate(str(error.code()), error.details() or "", what) from error


def translate(status: str, message: str, what: str) -> VitrineError:
    """The error for one gRPC status (`StatusCode.X`, empty inside a stream) and Triton's message with it."""
    if status == "StatusCode.DEADLINE_EXCEEDED":
        return DeadlineError(f"The request's time ran out before Triton answered for {what}; allow more time or retry later.")
    # Triton has no status of its own for a full queue: it comes as UNAVAILABLE, like a server that is gone.
    if status == "StatusCode.RESOURCE_EXHAUSTED" or "maximum queue size" in message or "timeout expired" in message:
        return CapacityError(f"Triton's queue for {what} is full; retry later.")
    if status == "StatusCode.NOT_FOUND" or any(words in message for words in NOT_SERVED):
        return BackendUnavailableError(f"Triton does not have {what} ready.")
    if status in ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "StatusCode.UNIMPLEMENTED"):
        return BackendUnavailableError(f"Triton does not answer for {what}; retry later.")
    return InferenceError(f"Triton failed on {what}: {(message.splitlines() or [status])[0]}")


def blames_the_call(error: InferenceError) -> bool:
    """Whether the call would fail without others in its batch, too.

    Triton says INVALID_ARGUMENT of a call that it refused by itself, and so does this project's Python backend, which runs the
    calls of a failed batch one by one. An engine that failed on a batch as a whole is INTERNAL.
    """
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415

    cause = error.__cause__
    return not isinstance(cause, InferenceServerException) or cause.status() == "StatusCode.INVALID_ARGUMENT"


def fill(inputs: Tensors, rows: int) -> Tensors:
    """Repeat the rows of `inputs`, in turn, until there are `rows`."""
    return {name: array[np.arange(rows) % len(array)] for name, array in inputs.items()}


def _tensor(name: str, array: NDArray[Any]) -> Any:
    from tritonclient.grpc import InferInput  # noqa: PLC0415

    return InferInput(name, array.shape, DATATYPES[array.dtype.name])  # type: ignore[index]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _seconds_left(ticket: Ticket) -> float | None:
    return None if ticket.remaining == float("inf") else ticket.remaining


def _listed(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {datatype} {list(shape)}" for name, datatype, shape in tensors)
