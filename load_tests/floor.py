"""The in-process floor: decode, resize and infer in a loop on all cores, with nothing around it.

One process per core and one thread per inference, with the functions that Vitrine's own stages call. No server that does this work
in this way can be faster; how near one comes is what it costs. `python -m load_tests.floor` prints one measurement.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from app.heap import keep_freed_memory
from app.settings import available_cpus
from load_tests.images import PHOTOS, Photo
from load_tests.loops import speeds
from load_tests.models import MODELS, Model
from load_tests.peers.classifier import Classifier

WARM_UP = 0.5  # seconds, after a first batch
BATCHES = (1, 8)


@dataclass(frozen=True)
class Floor:
    """Images per second of all processes together, and processor seconds of one image."""

    rate: float
    cpu: float
    batch: int


def measure(model: Model, photos: Sequence[tuple[Photo, float]]) -> list[Floor]:
    """One for each photo, which has its seconds for each of BATCHES; the better one counts, for the floor is what can be done.

    One set of processes measures all, because starting it takes longer than a measurement.
    """
    points = [((photo, batch), seconds) for photo, seconds in photos for batch in BATCHES]
    settings = {"BENCH_MODEL": str(model.onnx), "BENCH_MANIFEST": str(model.manifest), "BENCH_DECODE": "vitrine"}
    found = speeds(partial(_Classify, settings), points, available_cpus(), WARM_UP)
    floors = [Floor(speed.rate, speed.cpu, batch) for ((_, batch), _), speed in zip(points, found, strict=True)]
    return [
        max(floors[start : start + len(BATCHES)], key=lambda floor: floor.rate) for start in range(0, len(floors), len(BATCHES))
    ]


class _Classify:
    def __init__(self, settings: dict[str, str]) -> None:
        os.environ.update(settings)
        keep_freed_memory()
        self.classifier: Any = Classifier()
        self.data = {photo.file: photo.path.read_bytes() for photo in PHOTOS.values()}

    def step(self, point: tuple[Photo, int]) -> int:
        photo, batch = point
        frames = [self.classifier.prepare(self.data[photo.file]) for _ in range(batch)]
        self.classifier.infer(np.stack(frames) if batch > 1 else frames[0][None])
        return batch


if __name__ == "__main__":
    found = measure(MODELS["small"], [(PHOTOS["500x334"], 5)])[0]
    print(f"{found.rate:.1f} images/s, {1000 * found.cpu:.2f} ms of processor time per image, batch {found.batch}")
