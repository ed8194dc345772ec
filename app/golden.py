"""The smoke test of a loaded engine: the golden examples that travel with it must give their recorded outputs."""

import asyncio
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Backend
from app.decode import DecodeLimits, decode, open_image
from app.manifest import Entry, GoldenExample, ManifestError
from app.resize import content_size, resize
from app.text import phrase_tokenizer

TIMEOUT = 60.0

Arrays = dict[str, NDArray[Any]]


async def check_golden(backend: Backend, entry: Entry) -> None:
    """Run one real inference per golden example (one on zeros when there is none) and compare.

    Raises:
        ManifestError: an example is unreadable, or the engine's answer is not the recorded one.
        BackendError: the inference failed.
    """
    if entry.manifest.generation is not None:
        return  # the three engines of a chat model are tried together when they are loaded
    ticket = Ticket(deadline=time.monotonic() + TIMEOUT)
    if not entry.manifest.golden:
        await backend.infer(entry, _zeros(entry), ticket)
    for example in entry.manifest.golden:
        inputs, expected = await asyncio.to_thread(_read, entry, example)
        outputs = await backend.infer(entry, inputs, ticket)
        if {name: array.shape for name, array in outputs.items()} != {name: array.shape for name, array in expected.items()}:
            raise ManifestError(f"{entry} gives other outputs than {example.outputs} records; publish it again")
        for name, array in expected.items():
            difference = np.abs(outputs[name].astype(np.float64) - array)
            if not np.mean(~(difference <= example.tolerance)) <= example.outliers:
                share = f" in all but {example.outliers:.2%} of the values" if example.outliers else ""
                raise ManifestError(
                    f"{entry} does not reproduce {_name(example)}: {name} is off by {difference.max():.3g}, "
                    f"allowed are {example.tolerance:.3g}{share}; the engine or its runtime differs from what was verified"
                )


def _read(entry: Entry, example: GoldenExample) -> tuple[Arrays, Arrays]:
    """The inputs and the expected outputs, each [1,...]."""
    try:
        return _read_inputs(entry, example), _read_arrays(entry.path / example.outputs)
    except Exception as error:  # NumPy raises BadZipFile, EOFError, ValueError and more on broken archives
        raise ManifestError(f"golden example {_name(example)} of {entry} cannot be read: {error}") from error


def _read_inputs(entry: Entry, example: GoldenExample) -> Arrays:
    if example.inputs is not None:
        return _read_arrays(entry.path / example.inputs)
    inputs: Arrays = {}
    if example.image is not None:
        image, info = decode(open_image((entry.path / example.image).read_bytes(), DecodeLimits()))
        preprocessing, original = entry.manifest.preprocessing, (info.width, info.height)
        inputs["image"] = resize(image, preprocessing, original)[None]
        if entry.manifest.detection is not None and entry.manifest.detection.content:
            inputs["content"] = np.array([content_size(*original, preprocessing)], np.int32)
    if example.phrase is not None and entry.manifest.detection is not None:
        inputs["input_ids"] = phrase_tokenizer(entry).encode_together([example.phrase], "phrases")
    elif example.phrase is not None:
        phrase = phrase_tokenizer(entry).encode(example.phrase)
        inputs |= {"input_ids": phrase.input_ids[None], "attention_mask": phrase.attention_mask[None]}
    return {spec.name: inputs[spec.name] for spec in entry.manifest.inputs}


def _name(example: GoldenExample) -> str:
    return str(example.image or example.inputs or example.phrase)


def _read_arrays(file: Path) -> Arrays:
    with np.load(BytesIO(file.read_bytes()), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _zeros(entry: Entry) -> Arrays:
    return {spec.name: np.zeros((1, *spec.shape[1:]), spec.dtype) for spec in entry.manifest.inputs}
