"""The C library's allocator, told to keep what is freed: a step frees and asks for the same large tensors again."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST = 2**31 - 1  # bytes; mallopt takes an int


@functools.cache
def keep_freed_memory() -> bool:
    """Freed memory stays with this process, so that the next step need not have its pages cleared and mapped again.

    True if the C library took the setting (glibc does). The process's memory does not shrink any more until it ends. In
    threads but the first it holds only where there is one arena (MALLOC_ARENA_MAX=1), as in the ranks of a gang.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))
