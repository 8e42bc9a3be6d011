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
import threading
import weakref
from contextlib import suppress

import numpy as np

from vcelltools.errors import DataError
from vcelltools.runtime.memory import get_free_memory

ALIGN = 4096  # a multiple of the block size of any device
_HUGE = 2 << 20
_PIECE = 2 * _HUGE - 2 * ALIGN  # bytes of one direct read: with its unaligned ends, two huge pages
_LEAST = 64 << 10  # shorter reads do not pay for their unaligned ends
_SMALL_SHARE = 8  # a file below this part of the free memory is left in the page cache, for the next command
_WINDOWS, _WINDOW = 64, 1 << 20


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


class FileBytes:
    """The bytes of a file for many threads, read from the page cache if they are in it, otherwise past it.

    Small files, and files of which the cache holds nearly everything, are always read through the cache.

    Attributes
    ----------
    path, fd, size
        The path, an open file descriptor, and the number of bytes.
    cold
        Whether reads look for their pages in the cache and bypass it if they are not there. The disk then limits the
        speed, and reading and computing overlap only with more workers than cores.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self.fd).st_size
        self._local = threading.local()
        self._direct: DirectFile | None = None
        self._mapped: np.ndarray | None = None  # never read: it is what the system is asked about
        if self.size >= max(_WINDOW, get_free_memory() // _SMALL_SHARE):
            with suppress(OSError, ValueError):  # a file that cannot be mapped
                self._mapped = np.memmap(self.path, np.uint8, "r", shape=(self.size,))
        if self._mapped is not None and self._sample_share() < 0.99:
            direct = DirectFile(self.path)
            same = os.path.samestat(os.fstat(direct.fd), os.fstat(self.fd))  # nobody has replaced the file meanwhile
            self._direct = direct if direct.direct and same else None
        self.cold = self._direct is not None

    def _sample_share(self) -> float:
        assert self._mapped is not None
        starts = np.linspace(0, max(self.size - _WINDOW, 0), _WINDOWS).astype(np.int64).tolist()
        return float(np.mean([get_resident_share(self._mapped[a : a + _WINDOW]) for a in starts]))

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fill the contiguous array ``out`` from ``offset`` of the file.

        Raises
        ------
        DataError
            If the file ends earlier.
        """
        raw = out.reshape(-1).view(np.uint8)
        if self._direct is None or not self.cold or len(raw) < _LEAST or self._is_cached(offset, len(raw)):
            pread_into(self.fd, raw, offset, self.path)
            return
        if not hasattr(self._local, "room"):
            self._local.room = make_aligned(_PIECE + 2 * ALIGN)
        for a in range(0, len(raw), _PIECE):
            part = raw[a : a + _PIECE]
            first = (offset + a) // ALIGN * ALIGN
            skip = offset + a - first
            room = self._local.room[: -(-(skip + len(part)) // ALIGN) * ALIGN]
            self._direct.fill(room, first, skip + len(part))
            part[...] = room[skip : skip + len(part)]

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """Return (n_bytes,) uint8 from ``offset`` of the file; errors as in :meth:`read_into`."""
        out = np.empty(n_bytes, np.uint8)
        self.read_into(out, offset)
        return out

    def _is_cached(self, offset: int, n_bytes: int) -> bool:
        assert self._mapped is not None
        return get_resident_share(self._mapped[offset : offset + n_bytes]) > 0.5

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self._mapped, self._direct = -1, None, None


def pread_into(fd: int, out: np.ndarray, offset: int, path: str) -> None:
    """Fill the contiguous array ``out`` from ``offset`` of the file."""
    view = memoryview(out.view(np.uint8))  # type: ignore[arg-type]  # until 3.12 typeshed knows no buffers
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise DataError(f"{path}: the file ends at byte {offset + done} in the middle of its data (truncated)")
        done += n


def drop_pages(path: str | os.PathLike) -> None:
    """Write a file to the disk and drop its pages from the page cache, as far as the system allows it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


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
