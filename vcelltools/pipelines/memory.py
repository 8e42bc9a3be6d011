"""What memory this process took, what it can have, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def get_free_memory() -> int:
    """Return the bytes that can be had without swapping (the page cache's among them), within the cgroup's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) << 10
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        cached = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.split()[0] in ("active_file", "inactive_file")
        )
        used = int((group / "memory.current").read_text(encoding="ascii"))
        free = min(free, max(0, limit - used + cached))
    return free


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library keeps it: glibc does, below 32 MiB a piece."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
