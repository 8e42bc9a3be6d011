"""What memory this process took, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def trim_heap() -> None:
    """Hand freed memory back to the system, where the C library keeps it (glibc).

    A compilation by XLA frees more than 100 MB that would stay resident to the end.
    """
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
