"""The files of pass one, shared by several threads."""

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
from vcelltools.io.spill import pwrite_from
from vcelltools.io.write.atomic import step
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.sums import Sums
from vcelltools.stores.files import merge_over


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
        self.sums.close()
        for fd in self._fds:
            os.close(fd)

    def forget_cells(self) -> None:
        """Free the memory that only pass one needs: positions and library sizes of the source cells."""
        self.slot_of_cell, self.libsize = np.empty(0, np.int32), np.empty(0, np.int64)

    def write_rows(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Write work rows, in any order, to their positions, with one call for neighbours."""
        order = np.argsort(slots)
        places = slots[order]
        cuts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(slots)]
        for a, z in itertools.pairwise(cuts):
            self.write_block(rows[order[a:z]], int(places[a]))

    def write_block(self, rows: np.ndarray, first: int) -> None:
        """Write work rows, or the value rows that replace them, from the position ``first``."""
        pwrite_from(self._rows_fd, rows, first * self._layout.row_bytes)

    def read_block(self, first: int, rows: np.ndarray) -> None:
        """Fill ``rows`` with the work rows from ``first``."""
        pread_into(self._rows_fd, rows, first * self._layout.row_bytes, str(self.dpath / "X.f16"))

    def write_column(self, position: int, counts_n: np.ndarray) -> None:
        """Write the work column of a basis gene, uint16."""
        pwrite_from(self._columns_fd, counts_n, 2 * position * self._layout.n)

    def read_column(self, position: int, first: int, counts: np.ndarray) -> None:
        """Fill ``counts`` with a part of a work column, from row ``first``."""
        at = 2 * (position * self._layout.n + first)
        pread_into(self._columns_fd, counts, at, str(self.dpath / "columns.work"))

    def write_libsize(self, values: np.ndarray, first: int = 0) -> None:
        """Write library sizes from a given cell."""
        pwrite_from(self._libsize_fd, values, 8 * first)

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

    def save_state(self, name: str, *, sums: bool = True) -> dict[str, Any]:
        """Flush the files, save large counts, and sums unless told not to, and return the journal entry."""
        for fd in self._fds:
            os.fdatasync(fd)
        tmp = self.dpath / "state.tmp.work"
        with open(tmp, "wb") as f:
            np.save(f, self.get_over())
            if sums:
                self.sums.write(f)
            f.flush()
            os.fsync(f.fileno())
        step("state")
        os.replace(tmp, self.dpath / name)
        return {"state": name, "duplicates": self.duplicates}

    def add_state(self, line: dict[str, Any], dpath: Path | None = None, *, sums: bool = True) -> None:
        """Add the content of a state file, which was saved with or without sums."""
        with open((dpath or self.dpath) / line["state"], "rb") as f:
            self.add_over(np.load(f, allow_pickle=False), int(line["duplicates"]))
            if sums:
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

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return self._save is not None and time.monotonic() - self._saved > max(self._seconds, 20 * self._cost)

    def offer(self, done: int) -> None:
        """Record that everything before ``done`` is done, if enough time has passed."""
        if self._save is not None and self.due:
            began = time.monotonic()
            self._save(done)
            self._saved = time.monotonic()
            self._cost = self._saved - began
