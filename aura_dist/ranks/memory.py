"""The cores that this process may use, and how it takes and gives back memory."""

import ctypes
import os
import sys

# glibc's mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 2**26
# The same for a process yet to start. Dask has its workers give back all, and every chunk's pages were cleared anew.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_THRESHOLD_": str(_MAPPED_BYTES)}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Take freed memory again, rather than giving it back to the system and having it cleared anew.

    A forward on the CPU frees and takes tens of megabytes in every layer. glibc maps such blocks one by one, and
    clearing their pages took a fifth of the time of large batches. Kept in the heap, and in huge pages, they cost
    nothing; the longest batches run first, so that the heap has its full size from the beginning. Blocks of 64 MB
    and more, which are weights as a rule, are still mapped one by one: holes of their size would be a waste. Call
    before torch allocates. Does nothing where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)
