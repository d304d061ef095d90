"""How this process takes and gives back memory."""

import ctypes
import os
import sys

# glibc's mallopt(3)
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 2**20


def keep_memory_flat() -> None:
    """Map every large block on its own, in huge pages, so that freed memory goes back at once.

    A forward on the CPU frees and takes tens of megabytes in every layer, in sizes that change with the batch. In
    glibc's heap small objects settle in the holes, and a long run keeps growing. Blocks mapped on their own
    cannot fragment; torch's huge pages make up for the page faults. Call before torch allocates. Does nothing
    where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
