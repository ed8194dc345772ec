"""Prompts and answers of a chat model as its Python model in Triton takes and gives them; that is `export/triton_chat.py`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import CapacityError, InferenceError, InvalidValueError
from app.generate import Event, Prompt, Sampling, Stream


def request_tensors(prompt: Prompt, sampling: Sampling) -> dict[str, NDArray[Any]]:
    """The inputs by name; patches and grids of all images in order, where there are any."""
    tensors: dict[str, NDArray[Any]] = {
        "input_ids": prompt.input_ids,
        "max_tokens": np.array([sampling.max_tokens], np.int32),
        "temperature": np.array([sampling.temperature], np.float32),
        "top_p": np.array([sampling.top_p], np.float32),
        "top_k": np.array([sampling.top_k], np.int32),
    }
    if sampling.seed is not None:
        tensors["seed"] = np.array([sampling.seed], np.int64)
    if prompt.images:
        tensors["patches"] = np.concatenate([image.patches for image in prompt.images])
        tensors["grids"] = np.array([image.grid_thw for image in prompt.images], np.int64)
    return tensors


def is_last(result: Any) -> bool:
    """Whether nothing comes of the stream after this answer."""
    (finish,) = result.as_numpy("finish")
    return bool(finish)


def read_event(result: Any, stream: Stream, what: str) -> Event:
    """One of Triton's answers; its token is added to those of `stream`. `what` names the model.

    Raises:
        CapacityError, InvalidValueError, InferenceError: the model is full, cannot be given this prompt, or failed.
    """
    tokens, (finish,), (error,) = (result.as_numpy(name) for name in ("token", "finish", "error"))
    told = error.decode()
    match finish.decode():
        case "full":
            raise CapacityError(f"{what} in Triton is full: {told} Retry later.")
        case "invalid":
            raise InvalidValueError(told, field="messages")
        case "stop" | "length" | "" as ended:
            stream.finish = ended or None
            stream.tokens += tokens.tolist()
            return Event(stream, int(tokens[0]) if len(tokens) else None, stream.finish)
        case _:
            raise InferenceError(f"{what} failed in Triton: {told}")
