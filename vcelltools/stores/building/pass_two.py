"""Pass two: convert work rows to frames of exact counts and, in place, to values, bucket by bucket."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.write.atomic import step
from vcelltools.kernels import store as kernels
from vcelltools.runtime.progress import Progress
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.work import WorkFiles
from vcelltools.stores.files import Journal, UnitHasher, save_array, write_all
from vcelltools.stores.format import decode_frame, encode_frames, fill_work

COMMIT_BUCKETS = 3  # number of buckets whose values wait until their frames are on disk

ReadRows = Callable[[int, int, np.ndarray], None]
"""A function that fills an array with the work rows ``first:last`` of the store."""


class _Turned(NamedTuple):
    """A converted bucket: its values, and its frames with their sizes unless they are already written."""

    bucket: int
    values: np.ndarray
    frames: bytes | None
    sizes: np.ndarray | None


class Buckets:
    """Converts the buckets of a store.

    Parameters
    ----------
    libsize_n
        (n,) library sizes in store order.
    over
        (k, 3) sorted (store row, basis position, count) of counts that a work row cannot hold.
    read_rows
        Function that reads work rows if they are not in ``X.f16``.
    """

    def __init__(
        self, layout: Layout, work: WorkFiles, libsize_n: np.ndarray, over: np.ndarray, read_rows: ReadRows | None
    ) -> None:
        self.layout, self.work, self.libsize_n, self.over = layout, work, libsize_n, over
        self._read_rows = read_rows

    def run(self, dpath: Path, journal: Journal, n_done: int, n_frames: int, progress: Progress) -> None:
        """Convert all buckets; the frames (``n_frames``) of the first ``n_done`` buckets are already written."""
        layout = self.layout
        mode = "r+b" if n_done else "w+b"
        frames_fpath = dpath / "frames.work"
        with open(dpath / "counts.u8z", mode, buffering=0) as counts, open(frames_fpath, mode, buffering=0) as f:
            sizes = np.empty(len(layout.frame_starts) - 1, np.int64)
            sizes[:n_frames] = np.fromfile(frames_fpath, np.int64, n_frames)
            counts.truncate(int(sizes[:n_frames].sum()))
            f.truncate(8 * n_frames)
            writer = _Writer(self, journal, counts, f, sizes, n_frames, progress)
            progress.start("rows", layout.n, "cells")
            with writer, ThreadPoolExecutor(layout.threads) as pool:
                waiting: deque[Future[_Turned]] = deque()
                todo = iter(range(len(layout.edges) - 1))
                while True:
                    while len(waiting) < layout.threads + 1 and (k := next(todo, None)) is not None:
                        if k < n_done:
                            waiting.append(pool.submit(self._redo, k, sizes, counts.fileno()))
                        else:
                            waiting.append(pool.submit(self._make, k))
                    if not waiting:
                        break
                    writer.add(waiting.popleft().result())
                writer.finish()
        self.work.sync_rows()
        progress.finish()
        save_array(dpath / "frames.npy", np.stack([layout.frame_starts, np.append(0, np.cumsum(sizes))]))
        save_array(dpath / "X.xxh3.npy", writer.hasher.finish())
        save_array(dpath / "libsize.npy", self.libsize_n.astype(np.int64))

    def get_bounds(self, k: int) -> tuple[int, int, int, int]:
        """Return the first and last row, and the first and last frame, of a bucket."""
        a, b = int(self.layout.edges[k]), int(self.layout.edges[k + 1])
        f0, f1 = np.searchsorted(self.layout.frame_starts, [a, b]).tolist()
        return a, b, f0, f1

    def _make(self, k: int) -> _Turned:
        """Return a bucket made from its work rows."""
        a, b, f0, f1 = self.get_bounds(k)
        rows, row_of = self._read(a, b)
        i, j = np.searchsorted(self.over[:, 0], [a, b])
        over = self.over[i:j].copy()
        over[:, 0] -= a
        packed, escapes, values = self._turn(rows, row_of, a, b, over)
        frames, sizes = encode_frames(packed, escapes, self.layout.frame_starts[f0 : f1 + 1] - a)
        return _Turned(k, values, frames, sizes)

    def _redo(self, k: int, sizes: np.ndarray, fd: int) -> _Turned:
        """Return a bucket made from its frames, which are already written."""
        a, b, f0, f1 = self.get_bounds(k)
        starts, at = self.layout.frame_starts, int(sizes[:f0].sum())
        rows = np.zeros((b - a, self.layout.stride), np.uint16)
        over = []
        for f in range(f0, f1):
            raw = os.pread(fd, int(sizes[f]), at)
            at += int(sizes[f])
            r0, r1 = int(starts[f]) - a, int(starts[f + 1]) - a
            counts = np.empty((r1 - r0, self.layout.n_basis), np.uint32)
            decode_frame(raw, counts, where=f"{self.work.dpath}/counts.u8z: frame {f}")
            over.append(fill_work(rows[r0:r1], counts, r0))
        _, _, values = self._turn(rows, np.arange(b - a), a, b, np.concatenate(over))
        return _Turned(k, values, None, None)

    def _read(self, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (work rows, work row of each store row) for the rows ``a:b``."""
        layout = self.layout
        if layout.by_column:
            block = np.empty((layout.n_basis, b - a), np.uint16)
            for p in range(layout.n_basis):
                self.work.read_column(p, a, block[p])
            return np.ascontiguousarray(block.T), np.arange(b - a)
        rows = np.empty((b - a, layout.stride), np.uint16)
        if self._read_rows is not None:
            self._read_rows(a, b, rows)
        else:
            self.work.read_block(a, rows)
        row_of = np.empty(b - a, np.int64)
        row_of[np.argsort(layout.plan.order.source[a:b])] = np.arange(b - a)
        return rows, row_of

    def _turn(self, rows, row_of, a: int, b: int, over) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (packed rows, escapes, value rows) of work rows."""
        layout, m = self.layout, len(row_of)
        lib = self.libsize_n[a:b].astype(np.int64)
        packed = np.empty((m, layout.n_basis), np.uint8)
        values = np.empty((m, layout.stride), np.uint16)
        escapes = np.empty((4 * m, 3), np.int64)
        while True:
            n = kernels.finish_rows(
                rows, row_of, lib, over, layout.n_basis, layout.plan.target_sum, layout.single, packed, escapes, values
            )
            if n < 0:
                raise DataError(
                    f"{layout.ds.label}: the library size of a cell from {layout.plan.libsize_from} is less than the "
                    "sum of "
                    f"its basis genes ({int(lib[-n - 1]):,})",
                    hint="set library_size to the column of total counts, or remove it",
                )
            if n <= len(escapes):
                return packed, escapes[:n], values
            escapes = np.empty((n, 3), np.int64)


class _Writer:
    """Writes converted buckets in order: frames first, flushed and journalled, and then values over their work rows.

    A thread of its own waits for the disk while the next buckets are converted.
    """

    def __init__(
        self,
        buckets: Buckets,
        journal: Journal,
        counts: Any,
        sizes_file: Any,
        sizes: np.ndarray,
        n_sizes: int,
        progress: Progress,
    ) -> None:
        self._buckets, self._journal, self._progress = buckets, journal, progress
        self._counts, self._sizes_file, self._sizes, self._n_sizes = counts, sizes_file, sizes, n_sizes
        self._ready: list[_Turned] = []
        self.hasher = UnitHasher(buckets.layout.n)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def add(self, turned: _Turned) -> None:
        """Add the next bucket, and write once there are enough."""
        self._ready.append(turned)
        if sum(t.values.nbytes for t in self._ready) >= COMMIT_BUCKETS * self._buckets.layout.bucket_bytes:
            self._begin()

    def finish(self) -> None:
        """Write the rest, and wait until everything is written."""
        self._begin()
        self._wait()

    def _begin(self) -> None:
        self._wait()
        self._writing = self._thread.submit(self._commit, self._ready)
        self._ready = []

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _commit(self, ready: list[_Turned]) -> None:
        new = [t for t in ready if t.frames is not None]
        if new:
            self._write_frames(new)
        for t in ready:
            a, b, _, _ = self._buckets.get_bounds(t.bucket)
            self._buckets.work.write_block(t.values, a)
            step("values")
            self.hasher.update(t.values)
            self._progress.advance(b - a)

    def _write_frames(self, new: list[_Turned]) -> None:
        self._counts.seek(0, os.SEEK_END)
        self._sizes_file.seek(0, os.SEEK_END)
        for t in new:
            assert t.frames is not None and t.sizes is not None
            write_all(self._counts, t.frames)
            write_all(self._sizes_file, t.sizes.tobytes())
            self._sizes[self._n_sizes : self._n_sizes + len(t.sizes)] = t.sizes
            self._n_sizes += len(t.sizes)
        os.fdatasync(self._counts.fileno())
        os.fdatasync(self._sizes_file.fileno())
        step("frames")
        lines = [{"kind": "bucket", "bucket": t.bucket, "frames": self._buckets.get_bounds(t.bucket)[3]} for t in new]
        self._journal.append(*lines)
