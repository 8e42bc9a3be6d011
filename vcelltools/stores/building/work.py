"""The files and sums of pass one, shared by several threads."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.io.hdf5.direct import pread_into
from vcelltools.io.write.atomic import fsync_path, step
from vcelltools.kernels import store as kernels
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.files import merge_over, pwrite_all, trim

MAPPED_SUMS = 32 << 20  # at most this many bytes of a table on disk are touched before its pages are released


class Sums:
    """Sums of fixed-point values, (groups, measured genes) int64, in memory or in a file, shared by threads.

    Groups are divided among several locks, which threads take in turn, so that none waits for long.
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
        self._locks = [threading.Lock() for _ in range(2 * threads if threads > 1 else 1)]
        self._turns = itertools.count()

    def __len__(self) -> int:
        return len(self.table)

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
        for rows in self.ranges():
            f.write(np.ascontiguousarray(self.table[rows]).data)

    def add_file(self, f: Any) -> None:
        """Add a table that :meth:`write` wrote."""
        for rows in self.ranges():
            part = self.table[rows]
            part += np.fromfile(f, np.int64, part.size).reshape(part.shape)

    def save(self, path: Path) -> None:
        """Write the sums as float64, in the format of numpy."""
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f8")), "fortran_order": False}
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {**header, "shape": self.table.shape})
            for rows in self.ranges():
                f.write((self.table[rows] / kernels.FIXED_ONE).data)
        fsync_path(path)
        step("sums")


class WorkFiles:
    """The files of pass one in a folder (work rows or work columns, library sizes), and its sums.

    Attributes
    ----------
    libsize
        (cells,) int64, memory-mapped.
    slot_of_cell
        (cells,) int32: the work row of each cell in ``X.f16``, or -1 for dropped cells.
    duplicates
        Number of duplicate entries that were summed.
    """

    def __init__(self, layout: Layout, dpath: Path, slot_of_cell: np.ndarray) -> None:
        flags, n_cells = os.O_RDWR | os.O_CREAT, layout.ds.n_cells
        self.dpath, self.slot_of_cell, self.duplicates = dpath, slot_of_cell, 0
        self._layout = layout
        names = ("X.f16", "libsize.work", "columns.work")
        self._fds = [os.open(dpath / n, flags, 0o644) for n in names]
        self._rows_fd, self._libsize_fd, self._columns_fd = self._fds
        if layout.by_column:
            os.truncate(self._columns_fd, 2 * layout.n * layout.n_basis)
        os.ftruncate(self._libsize_fd, 8 * n_cells)
        self.libsize: np.ndarray = np.memmap(dpath / "libsize.work", np.int64, "r+", shape=(n_cells,))
        self.sums = Sums(layout.sums_shape, None if layout.sums_fit else dpath / "sums.work", layout.threads)
        self._over: list[np.ndarray] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)

    def forget_cells(self) -> None:
        """Free the memory that only pass one needs: positions and library sizes of the source cells."""
        self.slot_of_cell, self.libsize = np.empty(0, np.int32), np.empty(0, np.int64)

    def write_rows(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Write work rows to their positions, with one write for neighbours."""
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        for a, z in zip(np.append(0, cuts).tolist(), np.append(cuts, len(slots)).tolist(), strict=True):
            if z > a:
                self.write_block(rows[a:z], int(slots[a]))

    def write_block(self, rows: np.ndarray, first: int) -> None:
        """Write work rows, or the value rows that replace them, from the position ``first``."""
        pwrite_all(self._rows_fd, rows, first * self._layout.row_bytes)

    def read_block(self, first: int, rows: np.ndarray) -> None:
        """Fill ``rows`` with the work rows from ``first``."""
        pread_into(self._rows_fd, rows, first * self._layout.row_bytes, str(self.dpath / "X.f16"))

    def write_column(self, position: int, counts_n: np.ndarray) -> None:
        """Write the work column of a basis gene, uint16."""
        pwrite_all(self._columns_fd, counts_n, 2 * position * self._layout.n)

    def read_column(self, position: int, first: int, counts: np.ndarray) -> None:
        """Fill ``counts`` with a part of a work column, from row ``first``."""
        at = 2 * (position * self._layout.n + first)
        pread_into(self._columns_fd, counts, at, str(self.dpath / "columns.work"))

    def write_libsize(self, values: np.ndarray, first: int = 0) -> None:
        """Write library sizes from a given cell."""
        pwrite_all(self._libsize_fd, np.ascontiguousarray(values), 8 * first)

    def add_over(self, found: np.ndarray, duplicates: int = 0) -> None:
        """Record (store row, basis position, count) of counts that a work row cannot hold, and count duplicates."""
        with self._lock:
            self.duplicates += duplicates
            if len(found):
                self._over.append(found)

    def take_over(self) -> np.ndarray:
        """Return the large counts, sorted, and clear them."""
        out = merge_over(self._over)
        self._over.clear()
        return out

    def get_over(self) -> np.ndarray:
        """Return the large counts in their original order."""
        return np.concatenate(self._over) if self._over else np.empty((0, 3), np.int64)

    def sync_rows(self) -> None:
        """Flush the rows to the disk."""
        os.fdatasync(self._rows_fd)

    def save_state(self, name: str) -> dict[str, Any]:
        """Flush the files, save sums and large counts to a file, and return the journal entry."""
        for fd in self._fds:
            os.fdatasync(fd)
        tmp = self.dpath / "state.tmp.work"
        with open(tmp, "wb") as f:
            np.save(f, self.get_over())
            self.sums.write(f)
            f.flush()
            os.fsync(f.fileno())
        step("state")
        os.replace(tmp, self.dpath / name)
        return {"state": name, "duplicates": self.duplicates}

    def add_state(self, line: dict[str, Any], dpath: Path | None = None) -> None:
        """Add the content of a state file."""
        with open((dpath or self.dpath) / line["state"], "rb") as f:
            self.add_over(np.load(f, allow_pickle=False), int(line["duplicates"]))
            self.sums.add_file(f)


@contextmanager
def open_work(layout: Layout, dpath: Path, slot_of_cell: np.ndarray) -> Iterator[WorkFiles]:
    """Open the files of pass one in a folder, with empty sums."""
    work = WorkFiles(layout, dpath, slot_of_cell)
    try:
        yield work
    finally:
        work.close()


class Checkpoints:
    """Saves the progress of a pass every few seconds, using at most a twentieth of the time."""

    def __init__(self, save: Callable[[int], None] | None, seconds: float) -> None:
        self._save, self._seconds = save, seconds
        self._saved, self._cost = time.monotonic(), 0.0

    def offer(self, done: int) -> None:
        """Record that everything before ``done`` is done, if enough time has passed."""
        if self._save is not None and time.monotonic() - self._saved > max(self._seconds, 20 * self._cost):
            began = time.monotonic()
            self._save(done)
            self._saved = time.monotonic()
            self._cost = self._saved - began
