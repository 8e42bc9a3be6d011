"""Measure the memory of this process, find out how much is free, and return unused memory to the system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory() -> int:
    """Return the peak resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def get_free_memory() -> int:
    """Return the bytes available without swapping (including the page cache), within the limit of the cgroup."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) << 10
    with suppress(OSError, ValueError):  # "max" without a limit
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
    """Return freed memory to the system; glibc keeps freed blocks below 32 MiB."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
