"""Keep freed memory in the process, so that the next image does not ask the kernel for it again.

glibc gives large buffers back as soon as they are free, and the kernel clears every page that it hands out anew. What that costs
depends on what else lies on the heap: a server that only takes bodies of 3.7 MB spends 3 ms of CPU on each instead of 8, the
gateway as much as before; but its memory comes to its level at once and stays there, instead of growing for thousands of requests.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MAPPED = 32 << 20  # bytes from which a buffer is a mapping of its own: whole photos of 12 megapixels, given back at once
KEPT = 64 << 20  # free bytes at the end of a heap from which they are given back


def keep_freed_memory() -> bool:
    """Of this process, from now on. False where the C library is not glibc; nothing changes then."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all((mallopt(MMAP_THRESHOLD, MAPPED), mallopt(TRIM_THRESHOLD, KEPT)))
