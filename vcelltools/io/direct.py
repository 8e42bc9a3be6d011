"""Reading a file past the page cache, for data that memory cannot hold.

Through the page cache a read costs a copy, the making and the evicting of its pages, and readahead that nobody asked
for. With ``O_DIRECT`` the device writes straight into our memory. That wants offsets, lengths and addresses that are
multiples of a block; huge pages keep the list of addresses that the device is given short (measured: a third more
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

ALIGN = 4096  # any device's block fits
_HUGE = 2 << 20


def make_aligned(n_bytes: int) -> np.ndarray:
    """Return (n_bytes,) uint8 zeros that begin at a multiple of 2 MiB, on huge pages where the system has them."""
    room = mmap.mmap(-1, -(-n_bytes // _HUGE) * _HUGE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(room, np.uint8)  # the array keeps the map
    first = -whole.ctypes.data % _HUGE
    return whole[first : first + n_bytes]


class DirectFile:
    """An open file whose reads leave the page cache alone, where the file system can; through it elsewhere.

    Attributes
    ----------
    direct
        Whether reads go past the page cache. tmpfs and some network and overlay file systems refuse.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        self.fd, self.direct = -1, False
        try:
            fd = os.open(self.path, flags | os.O_DIRECT)
            try:
                os.preadv(fd, [make_aligned(ALIGN).data], 0)  # some refuse only now
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
        """Return (first byte, bytes before what is wanted, bytes of memory) of each read: aligned, if need be."""
        first = offset // ALIGN * ALIGN if self.direct else offset
        skip = offset - first
        return first, skip, -(-(skip + n_bytes) // ALIGN) * ALIGN

    def fill(self, room: np.ndarray, first: int, n_bytes: int) -> None:
        """Read at least ``n_bytes`` of the file from ``first`` on into ``room``.

        Parameters
        ----------
        room
            (bytes,) uint8 as :meth:`get_extents` says, part of what :func:`make_aligned` gave.

        Raises
        ------
        DataError
            Where the file ends before.
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
    """Return the share of a memory-mapped array's pages that memory holds; 1.0 where the system does not tell.

    Linux tells of a file only those who may write it.
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
