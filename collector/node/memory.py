"""Tells the C library to keep freed memory for the next turn instead of giving it back to the kernel.

Owns that one setting. Every turn allocates and frees the same few megabytes of columns; by default glibc unmaps them
each time, and the page faults cost as much as the encoding (1.1 us per event against 0.7, 8,192 at a time). Called by
`node.run` and bench/collector.py, once, at start.
"""

from __future__ import annotations

import ctypes

# From glibc's malloc.h; mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES_MAX = 64 << 20
HEAP_BYTES_MAX = 32 << 20  # larger ones are still mapped one by one; glibc allows no more


def keep_freed_memory() -> bool:
    """Let up to 64 MiB stay with the process; return False where the C library can't be told (musl)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES_MAX)) and bool(mallopt(M_MMAP_THRESHOLD, HEAP_BYTES_MAX))
