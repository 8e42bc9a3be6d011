"""The sums of fixed-point logs by group and gene, in memory or on disk."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vcelltools.io.hdf5.direct import pread_into
from vcelltools.io.spill import pwrite_from
from vcelltools.io.write.atomic import fsync_path, step
from vcelltools.kernels import store as kernels
from vcelltools.runtime.threads import share_work
from vcelltools.stores.files import trim

MAPPED_SUMS = 32 << 20  # at most this many bytes of a table on disk are touched before its pages are released
SPILL_SHARE = 4  # a spill of more than this many times the table is added to it
_WORDS = 1 << 21  # words of a part that a thread adds at once


class _Block(NamedTuple):
    """The spilled cells of one chunk, sorted by part: where their words are, and what their sums need."""

    offset: int
    ends: np.ndarray  # (cells + 1,) int32
    scale: np.ndarray  # (cells,) float64
    groups: np.ndarray  # (cells,) int32
    bounds: np.ndarray  # (parts + 1,) int32: first cell of each part

    def count(self, p: int) -> int:
        """Return the number of words of a part."""
        return int(self.ends[self.bounds[p + 1]] - self.ends[self.bounds[p]])


class Spill:
    """The counts of many cells in a file without a name, by chunk and within it by part, which is a range of groups.

    A count takes a word of 16 bits, as a rule; see :func:`vcelltools.kernels.store.csr_pack_counts`.

    Parameters
    ----------
    fpath
        Where the file is created; it is deleted at once and lives until it is closed.
    shape
        (groups, measured genes) of the sums.
    threads
        Number of threads of :meth:`drain`, each of which holds the sums of one part.
    """

    def __init__(self, fpath: Path, shape: tuple[int, int], threads: int) -> None:
        self._fd = os.open(fpath, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)
        fpath.unlink()
        self._path, self._threads, self._n_groups = str(fpath), threads, shape[0]
        self._rows = max(1, MAPPED_SUMS // 4 // max(8 * shape[1], 1))
        self._n_parts = -(-shape[0] // self._rows)
        self._lock, self._local = threading.Lock(), threading.local()
        self._blocks: list[_Block] = []
        self._n_genes = shape[1]
        self.n_bytes = 0

    def close(self) -> None:
        """Close the file, which deletes it."""
        os.close(self._fd)

    def add(self, indptr, indices, data, scale_b, group_b, measured_of_gene) -> bool:
        """Append a block of checked cells (CSR); return False, and append nothing, if a count is too large."""
        kept = np.flatnonzero(group_b >= 0)
        part = group_b[kept] // self._rows
        order = np.argsort(part, kind="stable")
        rows = kept[order]
        most = 3 * int(np.sum(indptr[rows + 1] - indptr[rows]))
        words = self._get_scratch(most)
        ends = np.empty(len(rows) + 1, np.int32)
        n = kernels.csr_pack_counts(indptr, indices, data, rows, measured_of_gene, ends, words)
        if n < 0:
            return False
        bounds = np.searchsorted(part[order], np.arange(self._n_parts + 1)).astype(np.int32)
        with self._lock:
            offset = self.n_bytes
            self.n_bytes += 2 * n
        pwrite_from(self._fd, words[:n], offset)
        block = _Block(offset, ends, np.ascontiguousarray(scale_b[rows]), group_b[rows].astype(np.int32), bounds)
        with self._lock:
            self._blocks.append(block)
        return True

    def drain(self, read: Callable[[int, np.ndarray], None], write: Callable[[int, np.ndarray], None]) -> None:
        """Add everything to the sums of each part, in threads, and start again.

        Parameters
        ----------
        read, write
            Fill an array with the sums so far from a group on, and take the new ones.
        """
        n_genes = self._n_genes

        def visit(p: int) -> None:
            first = p * self._rows
            sums = np.empty((min(self._rows, self._n_groups - first), n_genes), np.int64)
            read(first, sums)
            for blocks in self._cut(p):
                self._add_part(blocks, p, first, sums)
            write(first, sums)

        share_work(range(self._n_parts), [visit] * min(self._threads, self._n_parts))
        self._blocks, self.n_bytes = [], 0
        os.ftruncate(self._fd, 0)

    def _cut(self, p: int) -> Iterator[list[_Block]]:
        """Yield the blocks with cells of a part, as many at a time as have ``_WORDS`` words of it."""
        out: list[_Block] = []
        total = 0
        for block in self._blocks:
            n = block.count(p)
            if out and total + n > _WORDS:
                yield out
                out, total = [], 0
            if n:
                out.append(block)
                total += n
        if out:
            yield out

    def _add_part(self, blocks: list[_Block], p: int, first: int, sums: np.ndarray) -> None:
        """Add the cells that some blocks have of a part, group by group: the sums of a group fit in a cache."""
        words = self._get_scratch(sum(block.count(p) for block in blocks))
        starts, ends, at = [], [], 0
        for block in blocks:
            i, j = block.bounds[p], block.bounds[p + 1]
            n, shift = block.count(p), at - int(block.ends[i])
            pread_into(self._fd, words[at : at + n], block.offset + 2 * int(block.ends[i]), self._path)
            starts.append(block.ends[i:j] + np.int64(shift))
            ends.append(block.ends[i + 1 : j + 1] + np.int64(shift))
            at += n
        scale, group = (
            np.concatenate([values[b.bounds[p] : b.bounds[p + 1]] for b, values in pairs])
            for pairs in ([(b, b.scale) for b in blocks], [(b, b.groups) for b in blocks])
        )
        order = np.argsort(group, kind="stable")
        kernels.add_packed(
            words, np.concatenate(starts), np.concatenate(ends), scale, group - np.int32(first), order, sums
        )

    def _get_scratch(self, n: int) -> np.ndarray:
        """Return (n,) uint16 from the memory of this thread."""
        have = getattr(self._local, "words", None)
        if have is None or len(have) < n:
            self._local.words = have = np.empty(n + (n >> 3), np.uint16)
        return have[:n]


class Sums:
    """Sums of fixed-point values, (groups, measured genes) int64, in memory or in a file, shared by threads.

    Groups are divided among several locks, which threads take in turn, so that none waits for long. Cells come in any
    order of groups, so that adding each to a table on disk would touch all pages of a row for a few thousand values:
    their counts are kept in a :class:`Spill` and added group by group.
    """

    def __init__(self, shape: tuple[int, int], fpath: Path | None, threads: int) -> None:
        self._fpath, self._fd, self._empty = fpath, -1, True
        self._spill: Spill | None = None
        if fpath is None:
            self.table: np.ndarray = np.zeros(shape, np.int64)
        else:
            fpath.unlink(missing_ok=True)
            self.table = np.lib.format.open_memmap(fpath, mode="w+", dtype=np.int64, shape=shape)
            self._fd = os.open(fpath, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            self._first_byte = fpath.stat().st_size - self.table.nbytes
            if shape[1] <= 1 << 16:
                self._spill = Spill(fpath.with_name("counts.work"), shape, threads)
        self.rows_at_once = max(1, MAPPED_SUMS // 4 // max(8 * shape[1], 1))
        self._locks = [threading.Lock() for _ in range(2 * threads if threads > 1 else 1)]
        self._turns = itertools.count()

    def __len__(self) -> int:
        return len(self.table)

    def close(self) -> None:
        """Close and delete the spill."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with rows from ``first`` on, by calls if the table is on disk: a mapped page costs a fault."""
        if self._empty:
            out[:] = 0
        elif self._fd >= 0:
            pread_into(self._fd, out.reshape(-1), self._first_byte + first * self.table.strides[0], str(self._fpath))
        else:
            out[:] = self.table[first : first + len(out)]

    def _write(self, first: int, rows: np.ndarray) -> None:
        if self._fd >= 0:
            pwrite_from(self._fd, rows, self._first_byte + first * self.table.strides[0])
        else:
            self.table[first : first + len(rows)] = rows

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row, and a copy, of blocks of the table."""
        for a in range(0, len(self), self.rows_at_once):
            rows = np.empty((min(self.rows_at_once, len(self) - a), self.table.shape[1]), np.int64)
            self._read(a, rows)
            yield a, rows

    def spill(self, indptr, indices, data, scale_b, group_b, measured_of_gene) -> bool:
        """Keep the counts of a block of cells (CSR) for later; return False if they have to be added at once."""
        return self._spill is not None and self._spill.add(indptr, indices, data, scale_b, group_b, measured_of_gene)

    def settle(self) -> None:
        """Add what was spilled to the table; no other thread may add meanwhile."""
        if self._spill is not None and self._spill.n_bytes:
            self._spill.drain(self._read, self._write)
            self._empty = False

    def tidy(self) -> None:
        """Settle a large spill, and release the pages of a table on disk; no other thread may add meanwhile."""
        if self._spill is not None and self._spill.n_bytes > SPILL_SHARE * self.table.nbytes:
            self.settle()
        self.trim()

    def trim(self) -> None:
        """Release the pages of a table on disk, so that they do not count as memory of this process."""
        trim(self.table)

    def add_cells(self, indptr, indices, fixed, group_b, measured_of_gene) -> None:
        """Add the fixed-point values of a block of cells (CSR) to their groups."""
        n = len(group_b)
        self._empty = False
        step_rows, n_parts = self.rows_at_once if self._fd >= 0 else n, len(self._locks)
        turn = next(self._turns)
        for k in range(n_parts):
            part = (turn + k) % n_parts
            with self._locks[part]:
                for a in range(0, n, step_rows):
                    bounds, groups = indptr[a : a + step_rows + 1], group_b[a : a + step_rows]
                    kernels.csr_add_sums(bounds, indices, fixed, groups, measured_of_gene, part, n_parts, self.table)
                    if step_rows < n:
                        self.trim()

    def set_gene(self, position: int, sums_k: np.ndarray) -> None:
        """Set the sums of one gene; no lock is needed, because genes do not overlap."""
        self._empty = False
        for a in range(0, len(self), self.rows_at_once):
            self.table[a : a + self.rows_at_once, position] = sums_k[a : a + self.rows_at_once]
            self.trim()

    def add_genes(self, positions: np.ndarray, sums_km: np.ndarray) -> None:
        """Set the sums of several genes."""
        for a, rows in self._blocks():
            rows[:, positions] = sums_km[a : a + len(rows)]
            self._write(a, rows)
        self._empty = False

    def write(self, f: Any) -> None:
        """Write the table to an open file."""
        self.settle()
        for _, rows in self._blocks():
            f.write(rows.data)

    def add_file(self, f: Any) -> None:
        """Add a table that :meth:`write` wrote."""
        for a, rows in self._blocks():
            self._write(a, rows + np.fromfile(f, np.int64, rows.size).reshape(rows.shape))
        self._empty = False

    def save(self, path: Path) -> None:
        """Write the sums as float64, in the format of numpy, and free the table; nothing can be added to it later."""
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f8")), "fortran_order": False}
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {**header, "shape": self.table.shape})
            f.flush()
            fd, start = f.fileno(), f.tell()

            def write(first: int, rows: np.ndarray) -> None:
                pwrite_from(fd, rows / kernels.FIXED_ONE, start + 8 * first * rows.shape[1])

            if self._spill is not None:
                self._spill.drain(self._read, write)
            else:
                for a, rows in self._blocks():
                    write(a, rows)
        fsync_path(path)
        step("sums")
        self.close()
        self.table = np.empty((0, self.table.shape[1]), np.int64)
        if self._fpath is not None:
            self._fpath.unlink()
