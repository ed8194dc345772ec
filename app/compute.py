"""The threads on which a request's CPU work is done: decoding, resizing and, on the CPU, inference.

One pool for all of it, as many threads as there are CPUs. With a pool for each stage twice as many threads as cores push one
another off them; behind one another in one queue, what is decoded meanwhile becomes one batch (docs/performance.md).
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


def make_pool(threads: int) -> ThreadPoolExecutor:
    """The pool; whoever makes it shuts it down."""
    return ThreadPoolExecutor(threads, thread_name_prefix="compute", initializer=_give_way)


def _give_way() -> None:
    """Let the event loop run when it wakes up: it holds the interpreter's lock when it works, and all wait for it then."""
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it, and all works without
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))
