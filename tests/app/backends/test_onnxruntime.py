"""What only the embedded engine does: it takes its memory when it is loaded."""

import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from app.admission import Ticket
from app.backends import onnxruntime
from app.backends.onnxruntime import EngineOptions, OnnxRuntimeBackend
from tests.repository import MAX_BATCH, add_entry

pytestmark = pytest.mark.anyio

SIZE = 768
FRAMES = MAX_BATCH * SIZE * SIZE * 3 * 4  # bytes of the largest batch as float32, which the engine makes of it


async def growth_of_the_first_large_batch(repository: Path, **fields: object) -> int:
    """Bytes by which resident memory grows when a loaded engine computes a batch of the largest size."""
    entry = add_entry(repository, size=SIZE, **fields)
    backend = OnnxRuntimeBackend(options=EngineOptions(instances=1, most_threads=2))
    await backend.load(entry)
    images = np.ones((MAX_BATCH, SIZE, SIZE, 3), np.uint8)
    process = psutil.Process()
    before = process.memory_info().rss
    await backend.infer(entry, {"image": images}, Ticket(deadline=time.monotonic() + 30))
    grown = process.memory_info().rss - before
    await backend.close()
    return int(grown)


async def test_the_memory_of_the_largest_batch_is_taken_by_loading(tmp_path: Path) -> None:
    assert await growth_of_the_first_large_batch(tmp_path) < FRAMES / 4


async def test_an_engine_that_would_take_long_to_warm_up_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "WARM_UP", 0.0)
    assert await growth_of_the_first_large_batch(tmp_path) > FRAMES / 2
