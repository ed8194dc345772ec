"""The Python model of Triton that a chat model is published with, as `model.py` beside its decoder: tokens stream out of it.

It runs `app/generate.py`, a copy of which lies in the same directory, on the three engines of its version. A request is one
prompt with its sampling; each response has one `token`, or none, and `finish`, which is empty until the last: "stop", "length",
or with a sentence in `error` "full", "invalid" (the prompt) and "error". Who cancels a request frees its slot within one step. No
cache crosses the wire.
"""

import json
import logging
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

from app.generate import Generator, NoSlotError, PreparedImage, Prompt, PromptError, Sampling, Stream

log = logging.getLogger("vitrine.triton_chat")

_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class TritonPythonModel:
    """One instance of one version; the names of its methods are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engines and start the one thread that calls the generator."""
        parameters = {name: each["string_value"] for name, each in json.loads(args["model_config"])["parameters"].items()}
        directory = Path(args["model_repository"])
        self._generator = Generator.open(
            directory.parent,
            directory.name.rpartition(".")[0],
            int(args["model_version"]),
            threads=int(parameters["threads"]),
            max_streams=int(parameters["max_streams"]),
            providers=[provider for provider in _PROVIDERS if provider in onnxruntime.get_available_providers()],
        )
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._senders: dict[Stream, Any] = {}
        self._thread = threading.Thread(target=self._run, name="generate")
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests on; their responses come through their senders."""
        for request in requests:
            self._arrived.put((_read(request), request.get_response_sender()))

    def finalize(self) -> None:
        """End the thread; what is still under way is not answered further."""
        self._arrived.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Take what has arrived, advance what is alive, and wait only when nothing is."""
        while True:
            while self._senders == {} or not self._arrived.empty():
                arrived = self._arrived.get()
                if arrived is None:
                    return
                self._start(*arrived)
            for stream in [stream for stream, sender in self._senders.items() if sender.is_cancelled()]:
                self._generator.cancel(stream)
                self._end(self._senders.pop(stream))
            for event in self._generator.step():
                self._senders[event.stream].send(_response(event.token, event.finish or "", event.error or ""))
                if event.finish is not None:
                    self._end(self._senders.pop(event.stream))

    def _start(self, read: "tuple[Prompt, Sampling]", sender: Any) -> None:
        try:
            self._senders[self._generator.start(*read)] = sender
        except (NoSlotError, PromptError) as error:
            self._refuse(sender, "full" if isinstance(error, NoSlotError) else "invalid", str(error))
        except Exception as error:  # who asks Triton itself may send what no gateway does; the one thread goes on
            log.error("a request cannot be begun: %r", error)
            self._refuse(sender, "error", "The request cannot be begun; Triton's log says why.")

    def _refuse(self, sender: Any, finish: str, error: str) -> None:
        sender.send(_response(None, finish, error))
        self._end(sender)

    def _end(self, sender: Any) -> None:
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _read(request: Any) -> tuple[Prompt, Sampling]:
    def tensor(name: str) -> Any:
        found = pb_utils.get_input_tensor_by_name(request, name)
        return None if found is None else found.as_numpy()

    patches, grids = tensor("patches"), tensor("grids")
    images = []
    for grid in () if patches is None or grids is None else grids.tolist():
        count = int(np.prod(grid))
        images.append(PreparedImage(patches[:count], tuple(grid)))
        patches = patches[count:]
    seed = tensor("seed")
    sampling = Sampling(
        max_tokens=int(tensor("max_tokens")[0]),
        temperature=float(tensor("temperature")[0]),
        top_p=float(tensor("top_p")[0]),
        top_k=int(tensor("top_k")[0]),
        seed=None if seed is None else int(seed[0]),
    )
    return Prompt(tensor("input_ids"), tuple(images)), sampling


def _response(token: int | None, finish: str, error: str = "") -> Any:
    tokens = pb_utils.Tensor("token", np.array([] if token is None else [token], np.int32))
    strings = (pb_utils.Tensor(name, np.array([text], np.object_)) for name, text in (("finish", finish), ("error", error)))
    return pb_utils.InferenceResponse([tokens, *strings])
