"""Measure the memory of this process, find out how much is free, and return unused memory to the system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def peak_memory() -> int:
    """Return the peak resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def get_free_memory(root: str | os.PathLike = "/") -> int:
    """Return the bytes available without swapping (including the page cache), within the limits of the cgroups.

    Parameters
    ----------
    root
        Where ``/proc`` and ``/sys`` are.
    """
    root = Path(root)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) << 10
    for limit, usage, stat in _list_limits(root):
        with suppress(OSError, ValueError):  # "max" without a limit
            most = int(limit.read_text(encoding="ascii"))
            counts = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
            # version 1 gives the sums over the groups inside this one apart
            cached = sum(int(counts.get(f"total_{k}", counts.get(k, 0))) for k in ("active_file", "inactive_file"))
            free = min(free, max(0, most - int(usage.read_text(encoding="ascii")) + cached))
    return free


def _list_limits(root: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Yield the files with limit, usage and statistics of each memory cgroup of this process, inner ones first.

    The limit of a job of a scheduler is that of an outer group. In a container, the own group can be the top of the
    tree although its path is that of the host.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not path.startswith("/"):
            continue
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "memory.stat")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            yield group / names[0], group / names[1], group / names[2]


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps freed blocks below 32 MiB."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
