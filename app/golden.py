"""The smoke test of a loaded engine: the golden images that travel with it must give their recorded outputs."""

import asyncio
import time
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.admission import Ticket
from app.backends.base import Backend
from app.decode import DecodeLimits, decode, open_image
from app.manifest import Entry, GoldenExample, ManifestError
from app.resize import resize

TIMEOUT = 60.0


async def check_golden(backend: Backend, entry: Entry) -> None:
    """Run one real inference per golden example (one on zeros when there is none) and compare.

    Raises:
        ManifestError: an example is unreadable, or the engine's answer is not the recorded one.
        BackendError: the inference failed.
    """
    ticket = Ticket(deadline=time.monotonic() + TIMEOUT)
    if not entry.manifest.golden:
        await backend.infer(entry, _zeros(entry), ticket)
    for example in entry.manifest.golden:
        image, expected = await asyncio.to_thread(_read, entry, example)
        outputs = await backend.infer(entry, {"image": image[None]}, ticket)
        if {name: array.shape for name, array in outputs.items()} != {name: array.shape for name, array in expected.items()}:
            raise ManifestError(f"{entry} gives other outputs than {example.outputs} records; publish it again")
        for name, array in expected.items():
            difference = float(np.max(np.abs(outputs[name].astype(np.float64) - array)))
            if not difference <= example.tolerance:
                raise ManifestError(
                    f"{entry} does not reproduce {example.image}: {name} is off by {difference:.3g}, "
                    f"allowed are {example.tolerance:.3g}; the engine or its runtime differs from what was verified"
                )


def _read(entry: Entry, example: GoldenExample) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """The frame uint8 [H,W,3] and the expected outputs, each [1,...]."""
    try:
        opened = open_image((entry.path / example.image).read_bytes(), DecodeLimits())
        image, info = decode(opened)
        with np.load(BytesIO((entry.path / example.outputs).read_bytes()), allow_pickle=False) as archive:
            expected = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy raises BadZipFile, EOFError, ValueError and more on broken archives
        raise ManifestError(f"golden example {example.image} of {entry} cannot be read: {error}") from error
    return resize(image, entry.manifest.preprocessing, (info.width, info.height)), expected


def _zeros(entry: Entry) -> dict[str, NDArray[Any]]:
    return {spec.name: np.zeros((1, *spec.shape[1:]), spec.dtype) for spec in entry.manifest.inputs}
