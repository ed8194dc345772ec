"""The in-process floor: decode, resize and infer in a loop on all cores, with nothing around it.

One process per core and one thread per inference, with the functions that Vitrine's own stages call. No server that does this work
in this way can be faster; how near one comes is what it costs. `python -m load_tests.floor` prints one measurement.
"""

import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from app.settings import available_cpus
from load_tests.images import PHOTOS, Photo
from load_tests.models import MODELS, Model
from load_tests.peers.classifier import Classifier

WARM_UP = 1.0  # seconds


@dataclass(frozen=True)
class Floor:
    """Images per second of all processes together, and processor seconds of one image."""

    rate: float
    cpu: float
    batch: int


def measure(model: Model, photo: Photo, seconds: float, batches: tuple[int, ...] = (1, 8)) -> Floor:
    """The best of `batches`: the floor is what the machine can do, so the better batch counts."""
    return max((_measure(model, photo, seconds, batch) for batch in batches), key=lambda floor: floor.rate)


def _measure(model: Model, photo: Photo, seconds: float, batch: int) -> Floor:
    context = multiprocessing.get_context("spawn")
    settings = {"BENCH_MODEL": str(model.onnx), "BENCH_MANIFEST": str(model.manifest), "BENCH_DECODE": "vitrine"}
    data = photo.path.read_bytes()
    cores = available_cpus()
    barrier = context.Barrier(cores)
    with context.Pool(cores, _set, (settings, barrier)) as pool:
        parts = pool.starmap(_loop, [(data, batch, seconds)] * cores, chunksize=1)
    return Floor(sum(images / wall for images, wall, _ in parts), sum(p[2] for p in parts) / sum(p[0] for p in parts), batch)


_together: Barrier | None = None


def _set(settings: Mapping[str, str], barrier: Barrier) -> None:
    global _together  # noqa: PLW0603 -- a barrier reaches a spawned process only when it starts
    os.environ.update(settings)
    _together = barrier


def _loop(data: bytes, batch: int, seconds: float) -> tuple[int, float, float]:
    """(images, wall seconds, processor seconds) of one process."""
    classifier = Classifier()
    assert _together is not None
    _together.wait(60)
    _run(classifier, data, batch, WARM_UP)
    cpu, started = time.process_time(), time.perf_counter()
    images = _run(classifier, data, batch, seconds)
    return images, time.perf_counter() - started, time.process_time() - cpu


def _run(classifier: Any, data: bytes, batch: int, seconds: float) -> int:
    until = time.perf_counter() + seconds
    images = 0
    while time.perf_counter() < until:
        frames = [classifier.prepare(data) for _ in range(batch)]
        classifier.infer(np.stack(frames) if batch > 1 else frames[0][None])
        images += batch
    return images


if __name__ == "__main__":
    found = measure(MODELS["small"], PHOTOS["500x334"], 5)
    print(f"{found.rate:.1f} images/s, {1000 * found.cpu:.2f} ms of processor time per image, batch {found.batch}")
