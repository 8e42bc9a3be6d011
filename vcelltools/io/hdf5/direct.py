"""Read a file without the page cache, for data larger than memory.

A read through the page cache costs a copy, the allocation and eviction of its pages, and unnecessary readahead.
With ``O_DIRECT``, the device writes straight into our memory. This requires offsets, lengths and addresses that are
multiples of a block; huge pages keep the list of addresses for the device short (measured: a third more
bytes/s than with pages of 4 KiB).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from contextlib import suppress

import numpy as np

from vcelltools.errors import DataError

ALIGN = 4096  # a multiple of the block size of any device
_HUGE = 2 << 20


def make_aligned(n_bytes: int) -> np.ndarray:
    """Return (n_bytes,) uint8 zeros aligned to 2 MiB, on huge pages if the system has them."""
    room = mmap.mmap(-1, -(-n_bytes // _HUGE) * _HUGE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(room, np.uint8)  # the array keeps the map alive
    first = -whole.ctypes.data % _HUGE
    return whole[first : first + n_bytes]


class DirectFile:
    """An open file whose reads bypass the page cache if the file system allows it.

    Attributes
    ----------
    direct
        Whether reads bypass the page cache. tmpfs and some network and overlay file systems do not allow it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        self.fd, self.direct = -1, False
        try:
            fd = os.open(self.path, flags | os.O_DIRECT)
            try:
                os.preadv(fd, [make_aligned(ALIGN).data], 0)  # some file systems fail only here
                self.fd, self.direct = fd, True
            except OSError:
                os.close(fd)
        except (AttributeError, OSError):
            pass
        if not self.direct:
            self.fd = os.open(self.path, flags)
            with suppress(AttributeError, OSError):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        weakref.finalize(self, os.close, self.fd)

    def get_extents(self, offset: np.ndarray, n_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (first byte, leading bytes to skip, bytes of memory) of each read, aligned if necessary."""
        first = offset // ALIGN * ALIGN if self.direct else offset
        skip = offset - first
        return first, skip, -(-(skip + n_bytes) // ALIGN) * ALIGN

    def fill(self, room: np.ndarray, first: int, n_bytes: int) -> None:
        """Read at least ``n_bytes`` of the file from ``first`` on into ``room``.

        Parameters
        ----------
        room
            (bytes,) uint8 of the size that :meth:`get_extents` returns, part of a result of :func:`make_aligned`.

        Raises
        ------
        DataError
            If the file ends earlier.
        """
        view = (room if self.direct else room[:n_bytes]).data
        done = os.preadv(self.fd, [view], first)
        while done < n_bytes:
            if self.direct and done % ALIGN:
                raise self._refuse(first + done)
            n = os.preadv(self.fd, [view[done:]], first + done)
            if n == 0:
                raise self._refuse(first + done)
            done += n

    def _refuse(self, at: int) -> DataError:
        return DataError(f"{self.path}: the file ends at byte {at} in the middle of its data (truncated)")


def get_resident_share(mapped: np.ndarray) -> float:
    """Return the fraction of the pages of a memory-mapped array that are in memory; 1.0 if it is unknown.

    Linux reports it only to users who may write to the file.
    """
    page = mmap.PAGESIZE
    first = mapped.ctypes.data // page * page
    n_bytes = mapped.ctypes.data + mapped.nbytes - first
    held = np.empty(-(-n_bytes // page), np.uint8)
    try:
        mincore = ctypes.CDLL(None).mincore
    except (AttributeError, OSError):
        return 1.0
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    if not len(held) or mincore(first, n_bytes, held.ctypes.data):
        return 1.0
    return float(np.mean(held & 1))
