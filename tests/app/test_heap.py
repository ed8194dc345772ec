"""Freed memory stays in the process: counted by the pages that the kernel has to clear."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from app.heap import keep_freed_memory

def receive():
    pieces = [bytes(256 << 10) for _ in range(14)]
    body = b"".join(pieces)

kept = sys.argv[1] == "kept" and keep_freed_memory()
receive()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    receive()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_second_body_takes_the_pages_of_the_first() -> None:
    (_, usually), (kept, here) = faults("returned"), faults("kept")
    assert kept == "True"
    assert usually > 20 * 900  # 3.7 MB are 900 pages
    assert here < 900
