"""The sums of fixed-point logs by group and gene, in memory or on disk."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
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
SPILL_SHARE = 2  # a spill of more than this many times the table is added to it


class _Block(NamedTuple):
    """The spilled cells of one chunk, sorted by part: where their words are, and what their sums need."""

    offset: int
    ends: np.ndarray  # (cells + 1,) int32
    scale: np.ndarray  # (cells,) float64
    groups: np.ndarray  # (cells,) int32
    bounds: np.ndarray  # (parts + 1,) int32: first cell of each part


class Spill:
    """The counts of many cells in a file without a name, by chunk and within it by part, which is a range of groups.

    A count is a word of 32 bits: the measured gene, and a count below 65,536.

    Parameters
    ----------
    fpath
        Where the file is created; it is deleted at once and lives until it is closed.
    shape
        (groups, measured genes) of the sums.
    threads
        Number of threads of :meth:`settle`, each of which holds the sums of one part.
    """

    def __init__(self, fpath: Path, shape: tuple[int, int], threads: int) -> None:
        self._fd = os.open(fpath, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)
        fpath.unlink()
        self._path, self._threads, self._n_groups = str(fpath), threads, shape[0]
        self._rows = max(1, MAPPED_SUMS // 4 // max(8 * shape[1], 1))
        self._n_parts = -(-shape[0] // self._rows)
        self._lock, self._local = threading.Lock(), threading.local()
        self._blocks: list[_Block] = []
        self._every = np.arange(shape[1], dtype=np.int32)
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
        most = int(np.sum(indptr[rows + 1] - indptr[rows]))
        words = self._get_scratch(most)
        ends = np.empty(len(rows) + 1, np.int32)
        n = kernels.csr_pack_counts(indptr, indices, data, rows, measured_of_gene, ends, words)
        if n < 0:
            return False
        bounds = np.searchsorted(part[order], np.arange(self._n_parts + 1)).astype(np.int32)
        with self._lock:
            offset = self.n_bytes
            self.n_bytes += 4 * n
        pwrite_from(self._fd, words[:n], offset)
        block = _Block(offset, ends, np.ascontiguousarray(scale_b[rows]), group_b[rows].astype(np.int32), bounds)
        with self._lock:
            self._blocks.append(block)
        return True

    def settle(self, table_fd: int, first_byte: int) -> None:
        """Add everything to the table that an open file holds from ``first_byte`` on, part by part, and start again.

        The file is read and written by calls, because a mapped page would cost a fault each time.
        """
        if self._blocks:

            def visit(p: int) -> None:
                first = p * self._rows
                sums = np.empty((min(self._rows, self._n_groups - first), len(self._every)), np.int64)
                at = first_byte + 8 * first * len(self._every)
                pread_into(table_fd, sums.reshape(-1), at, self._path)
                for block in self._blocks:
                    self._add_part(block, p, first, sums)
                pwrite_from(table_fd, sums, at)

            share_work(range(self._n_parts), [visit] * min(self._threads, self._n_parts))
        self._blocks, self.n_bytes = [], 0
        os.ftruncate(self._fd, 0)

    def _add_part(self, block: _Block, p: int, first_group: int, sums: np.ndarray) -> None:
        i, j = int(block.bounds[p]), int(block.bounds[p + 1])
        if i == j:
            return
        ends = (block.ends[i : j + 1] - block.ends[i]).astype(np.int64)
        words = self._get_scratch(int(ends[-1]))
        pread_into(self._fd, words, block.offset + 4 * int(block.ends[i]), self._path)
        genes, counts = (words >> 16).astype(np.int32), (words & 0xFFFF).astype(np.int32)
        fixed = np.empty(len(words), np.int32)
        kernels.csr_fixed_logs(ends, counts, block.scale[i:j], fixed)
        kernels.csr_add_sums(ends, genes, fixed, block.groups[i:j] - np.int32(first_group), self._every, 0, 1, sums)

    def _get_scratch(self, n: int) -> np.ndarray:
        """Return (n,) uint32 from the memory of this thread."""
        have = getattr(self._local, "words", None)
        if have is None or len(have) < n:
            self._local.words = have = np.empty(n + (n >> 3), np.uint32)
        return have[:n]


class Sums:
    """Sums of fixed-point values, (groups, measured genes) int64, in memory or in a file, shared by threads.

    Groups are divided among several locks, which threads take in turn, so that none waits for long. Cells come in any
    order of groups, so that adding each to a table on disk would touch all pages of a row for a few thousand values:
    their counts are kept in a :class:`Spill` and added group by group.
    """

    def __init__(self, shape: tuple[int, int], fpath: Path | None, threads: int) -> None:
        if fpath is None:
            self.table: np.ndarray = np.zeros(shape, np.int64)
            self.rows_at_once = max(1, shape[0])
        else:
            fpath.unlink(missing_ok=True)
            self.table = np.lib.format.open_memmap(fpath, mode="w+", dtype=np.int64, shape=shape)
            self.rows_at_once = max(1, MAPPED_SUMS // max(8 * shape[1], 1))
        self._mapped = fpath is not None
        self._spill: Spill | None = None
        if fpath is not None and shape[1] <= 1 << 16:
            self._spill = Spill(fpath.with_name("counts.work"), shape, threads)
            self._table_fd = os.open(fpath, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            self._first_byte = fpath.stat().st_size - self.table.nbytes
        self._locks = [threading.Lock() for _ in range(2 * threads if threads > 1 else 1)]
        self._turns = itertools.count()

    def __len__(self) -> int:
        return len(self.table)

    def close(self) -> None:
        """Close and delete the spill."""
        if self._spill is not None:
            self._spill.close()
            os.close(self._table_fd)
            self._spill = None

    def spill(self, indptr, indices, data, scale_b, group_b, measured_of_gene) -> bool:
        """Keep the counts of a block of cells (CSR) for later; return False if they have to be added at once."""
        return self._spill is not None and self._spill.add(indptr, indices, data, scale_b, group_b, measured_of_gene)

    def settle(self) -> None:
        """Add what was spilled to the table; no other thread may add meanwhile."""
        if self._spill is not None:
            self._spill.settle(self._table_fd, self._first_byte)

    def tidy(self) -> None:
        """Settle a large spill, and release the pages of a table on disk; no other thread may add meanwhile."""
        if self._spill is not None and self._spill.n_bytes > SPILL_SHARE * self.table.nbytes:
            self.settle()
        self.trim()

    def trim(self) -> None:
        """Release the pages of a table on disk, so that they do not count as memory of this process."""
        trim(self.table)

    def ranges(self) -> Iterator[slice]:
        """Yield ranges of rows, releasing pages after each."""
        for a in range(0, len(self), self.rows_at_once):
            yield slice(a, min(a + self.rows_at_once, len(self)))
            self.trim()

    def add_cells(self, indptr, indices, fixed, group_b, measured_of_gene) -> None:
        """Add the fixed-point values of a block of cells (CSR) to their groups."""
        n = len(group_b)
        step_rows, n_parts = self.rows_at_once if self._mapped else n, len(self._locks)
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
        for a in range(0, len(self), self.rows_at_once):
            self.table[a : a + self.rows_at_once, position] = sums_k[a : a + self.rows_at_once]
            if self._mapped:
                self.trim()

    def add_genes(self, positions: np.ndarray, sums_km: np.ndarray) -> None:
        """Set the sums of several genes."""
        for rows in self.ranges():
            self.table[rows, positions] = sums_km[rows]

    def write(self, f: Any) -> None:
        """Write the table to an open file."""
        self.settle()
        for rows in self.ranges():
            f.write(np.ascontiguousarray(self.table[rows]).data)

    def add_file(self, f: Any) -> None:
        """Add a table that :meth:`write` wrote."""
        for rows in self.ranges():
            part = self.table[rows]
            part += np.fromfile(f, np.int64, part.size).reshape(part.shape)

    def save(self, path: Path) -> None:
        """Write the sums as float64, in the format of numpy."""
        self.settle()
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f8")), "fortran_order": False}
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {**header, "shape": self.table.shape})
            for rows in self.ranges():
                f.write((self.table[rows] / kernels.FIXED_ONE).data)
        fsync_path(path)
        step("sums")
