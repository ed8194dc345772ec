"""The served side of verification: the gateway's own decoding and resizing, and a staged engine asked in batches."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Tensors
from app.decode import DecodeLimits, ImageInfo, decode, open_image
from app.manifest import Check, Entry, Manifest, ManifestError, Preprocessing, check_hashes, read_entry
from app.resize import minimum_size, resize
from export.runner import Infer, Run
from export.spec import ExportError, Staged

Frames = NDArray[np.uint8]
BATCHES = (1, 3, 8)


def served_image(data: bytes, preprocessing: Preprocessing, *, scaled: bool = False) -> tuple[Frames, ImageInfo]:
    """A frame uint8 [H,W,3] as the gateway makes it, and what decoding says of the image."""
    smallest = partial(minimum_size, preprocessing=preprocessing) if scaled else None
    image, info = decode(open_image(data, DecodeLimits(), smallest))
    return resize(image, preprocessing, (info.width, info.height)), info


def served_pixels(data: bytes, preprocessing: Preprocessing, *, scaled: bool = False) -> tuple[Frames, int]:
    """The frame, and by how much decoding reduced the image (1: not at all)."""
    frame, info = served_image(data, preprocessing, scaled=scaled)
    return frame, info.scaled


def batches_for(manifest: Manifest) -> tuple[int, ...]:
    """The batch sizes to verify, as far as the engine's largest goes."""
    return tuple(sorted({min(batch, manifest.engine.max_batch) for batch in BATCHES}))


def ask(infer: Infer, rows: NDArray[Any], batch: int = 1) -> NDArray[Any]:
    """All rows in full batches; the last one is filled up from the first row on."""
    return np.concatenate([infer(rows[part]) for part in _parts(len(rows), batch)])[: len(rows)]


def ask_all(run: Run, inputs: Tensors, batch: int = 1) -> dict[str, NDArray[Any]]:
    """`ask` for an engine of several inputs and outputs, by name."""
    count = len(next(iter(inputs.values())))
    answers = [run({name: rows[part] for name, rows in inputs.items()}) for part in _parts(count, batch)]
    return {name: np.concatenate([answer[name] for answer in answers])[:count] for name in answers[0]}


def _parts(count: int, batch: int) -> NDArray[np.intp]:
    """The numbers of the rows of each batch."""
    return np.resize(np.arange(count), -(-count // batch) * batch).reshape(-1, batch)


def staged_entry(staged: Staged) -> Entry:
    """The staged version as the gateway reads it, its hashes checked.

    Raises:
        ExportError: it is not whole.
    """
    try:
        entry = read_entry(staged.path)
        check_hashes(entry)
    except ManifestError as error:
        raise ExportError(f"The staged version is not whole: {error}") from error
    return entry


def failure(checks: tuple[Check, ...]) -> str:
    """What to tell of checks some of which failed."""
    failed = [check for check in checks if check.required and not check.passed]
    lines = [f"  {check.name}: {check.value:.4g} {check.unit}, the limit is {check.limit:.4g}" for check in failed]
    return "\n".join(("The engine does not do what its reference does; nothing was published. Failed checks:", *lines))
