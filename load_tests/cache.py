"""Where a run keeps what it makes once: images, models, environments of the peers, finished cells."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "load_tests/results"


def cache() -> Path:
    """`load_tests/.cache`, or what VITRINE_BENCH_CACHE names; made when it is not there."""
    path = Path(os.environ.get("VITRINE_BENCH_CACHE") or ROOT / "load_tests/.cache").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path
