"""Building a store: one pass over the source, then one over the store, each resumable.

Pass one scatters the basis counts of every cell, as uint16 work rows, into the place in ``X.f16`` where its bucket
(some thousand neighbouring store rows) will lie, and adds up library sizes and sums. Pass two takes one bucket
after the other: sorts its rows, appends their exact counts to ``counts.u8z``, and only then turns the same place
of ``X.f16`` into values. So the disk holds nothing twice, memory holds some buckets, and a bucket that a crash
left half turned is made again from its counts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io import CscMatrix, Dataset, DenseMatrix
from vcelltools.io.arrays import pread_into
from vcelltools.io.atomic import dump_json, fsync_path, replace_folder, step
from vcelltools.io.table import RANGE
from vcelltools.kernels import store as kernels
from vcelltools.pipelines.memory import trim_heap
from vcelltools.pipelines.store_columns import scatter_columns
from vcelltools.pipelines.store_files import (
    Journal,
    UnitHasher,
    hash_array,
    hash_parts,
    merge_over,
    pwrite_all,
    save_array,
    to_smallest,
    trim,
    write_all,
)
from vcelltools.pipelines.store_format import (
    CODING,
    MANIFEST,
    PARTS,
    SCHEMA,
    decode_frame,
    encode_frames,
    fill_work,
    get_frame_starts,
    get_stride,
    read_manifest,
)
from vcelltools.pipelines.store_plan import StorePlan
from vcelltools.pipelines.store_rows import scatter_rows
from vcelltools.pipelines.store_tables import write_manifest, write_tables
from vcelltools.progress import SILENT, Progress
from vcelltools.stream import get_threads

if TYPE_CHECKING:
    from distributed import Client

BUCKET_BYTES = 4 << 20
COMMIT_BUCKETS = 4  # whose values wait until their frames are on the disk
CHUNK_VALUES = 1 << 20
CHECKPOINT_SECONDS = 10.0
MEMORY_BYTES = 500_000_000
_LEAST_SUMS = 32 << 20  # that stay in memory whatever else is there
_BASE_BYTES = 260 << 20  # the interpreter, its libraries, and tables of a fixed size
MAPPED_SUMS = 32 << 20  # of a table on disk, at most this much is touched before its pages are handed back


class Builder:
    """One store in the making: its folder, files, and the steps to the end."""

    def __init__(
        self,
        plan: StorePlan,
        ds: Dataset,
        dpath: Path,
        *,
        source: dict[str, Any],
        threads: int | None = None,
        chunk_values: int = CHUNK_VALUES,
        bucket_bytes: int = BUCKET_BYTES,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        memory_bytes: float = MEMORY_BYTES,
        progress: Progress = SILENT,
    ) -> None:
        self.plan, self.ds, self.dpath = plan, ds, dpath
        self.source = source
        self.threads = get_threads(threads)
        self.chunk_values, self.bucket_bytes = chunk_values, bucket_bytes
        self.checkpoint_seconds, self.memory_bytes = checkpoint_seconds, memory_bytes
        self.progress = progress
        self.n = plan.order.n
        self.stride = get_stride(plan.n_basis)
        self.row_bytes = self.stride * 2
        self.single = np.dtype(ds.matrix.dtype) != np.float64
        lengths = plan.order.runs["length"].to_numpy()
        self.frame_starts = get_frame_starts(lengths)
        self.edges = self._get_edges(max(16, bucket_bytes // self.row_bytes))
        self.basis_of_column = plan.basis_of_column
        self.measured = self._get_measured()
        self.measured_of_column = self._get_measured_of_column()
        some = self.measured_of_column[self.measured_of_column >= 0]
        self.measured_is_plain = len(np.unique(some)) == len(some)  # no two columns are one gene
        self.known_libsize = plan.libsize
        self.journal = Journal(dpath / "journal")
        self.part_rows: list[tuple[np.ndarray, int]] = []  # of a cluster: work rows each part wrote, and its file
        self.lock = threading.Lock()
        # groups are shared out over the locks, and threads take these in turns, so that none waits for long
        self.sum_locks = [threading.Lock() for _ in range(2 * self.threads if self.threads > 1 else 1)]
        self.turns = itertools.count()

    def _get_edges(self, bucket_rows: int) -> np.ndarray:
        """Bucket boundaries: frame starts, about ``bucket_rows`` apart."""
        at = np.searchsorted(self.frame_starts, np.arange(0, self.n, bucket_rows))
        return np.unique(np.append(self.frame_starts[at], self.n))

    def _get_slots(self) -> np.ndarray:
        """(cells,) int32: the work row of each source cell: its bucket, then source order; -1 where left out."""
        slots = np.full(len(self.plan.order.row_of_cell), -1, np.int32)
        for a, b in zip(self.edges[:-1], self.edges[1:], strict=True):
            slots[np.sort(self.plan.order.source[a:b])] = np.arange(a, b)
        return slots

    def _get_measured(self) -> np.ndarray:
        """Genes of the file (merged) whose sums are kept, in order."""
        merged = self.plan.match.merged
        if self.sums_mode == "basis":
            return self.plan.match.gene_of[self.plan.match.present].astype(np.int64)
        return np.arange(len(merged.ids), dtype=np.int64)

    def _get_measured_of_column(self) -> np.ndarray:
        """(columns,) int32: the column of the sums of each column of the file, -1 where it has none."""
        merged = self.plan.match.merged
        of_gene = np.full(len(merged.ids), -1, np.int32)
        of_gene[self.measured] = np.arange(len(self.measured))
        return of_gene[merged.of_column]

    @property
    def by_column(self) -> bool:
        """Whether the matrix is read gene by gene."""
        m = self.ds.matrix
        return isinstance(m, CscMatrix) or (isinstance(m, DenseMatrix) and m.axis == 1)

    @property
    def sums_mode(self) -> str:
        """``all`` or ``basis``."""
        mode = self.plan.spec.sums
        return ("basis" if self.by_column else "all") if mode == "auto" else mode

    @property
    def disk_bytes(self) -> int:
        """About what the finished store needs, and what the making of it needs beside."""
        work = 2 * self.plan.n_basis if self.by_column else 0
        return self.n * (work + self.row_bytes + self.plan.n_basis // 3 + 300) + 4 * self.sums_bytes

    @property
    def sums_bytes(self) -> int:
        """What the sums of all groups over all measured genes take."""
        return 8 * self.plan.order.n_groups * len(self.measured)

    @property
    def work_bytes(self) -> int:
        """About what building holds in memory, the sums aside."""
        per_thread = 30 * self.chunk_values + 6 * (self.edges[1] - self.edges[0]) * self.row_bytes
        return int(_BASE_BYTES + self.threads * per_thread + (56 if self.by_column else 26) * self.ds.n_cells)

    @property
    def sums_fit(self) -> bool:
        """Whether the sums stay in memory; on disk they are some three times slower to add to."""
        return self.sums_bytes <= max(_LEAST_SUMS, self.memory_bytes - self.work_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """What the bytes of the store depend on, hashed; a journal of other bytes is not continued."""
        import zstandard

        from vcelltools import __version__

        order = self.plan.order
        parts = {
            "schema": SCHEMA,
            "version": __version__,
            "coding": CODING,
            "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
            "source": self.source,
            "basis": self.plan.basis.sha256,
            "target_sum": self.plan.target_sum,
            "single": self.single,
            "sums": self.sums_mode,
            "order": hash_array(order.source),
            "groups": hash_parts(order.get_groups(a, a + RANGE) for a in range(0, self.ds.n_cells, RANGE)),
            "columns": hash_array(self.plan.basis_of_column),
            "measured": hash_array(self.plan.match.merged.of_column),
            "library_size": self.plan.libsize_from,
            "known": None if self.plan.libsize is None else hash_array(self.plan.libsize),
        }
        return hashlib.sha256(dump_json(parts).encode()).hexdigest()

    @property
    def parts_dpath(self) -> Path:
        """Where the workers of a cluster leave their parts; of this plan alone."""
        return self.dpath.with_name(f".{self.plan.spec.name}.{self.fingerprint[:12]}.parts")

    def _remove_parts(self) -> None:
        for old in self.dpath.parent.glob(f".{self.plan.spec.name}.*.parts"):
            shutil.rmtree(old, ignore_errors=True)

    # -- the road ------------------------------------------------------------------------------------------------

    def run(self, cluster: Client | None = None, part_cells: int = 1 << 16) -> None:
        """Build up to the manifest, continuing where an earlier run of the same plan stopped."""
        lines = self._resume()
        if not self.sums_fit:
            gb, shape = (self.work_bytes + self.sums_bytes) / 1e9, (self.plan.order.n_groups, len(self.measured))
            self.progress.note(
                f"{self.plan.spec.name}: the sums of {shape[0]:,} groups over {shape[1]:,} genes lie on disk, which is "
                f"slow: --memory {math.ceil(10 * gb) / 10:g} keeps them in memory, --sums basis keeps fewer"
            )
        scattered = next((x for x in lines if x["kind"] == "scattered"), None)
        parts = scattered.get("parts") if scattered is not None else None
        if scattered is None and cluster is not None:
            from vcelltools.pipelines.cluster import scatter_on_cluster

            done = [x for x in lines if x["kind"] == "part"]
            parts = scatter_on_cluster(self, cluster, done, part_cells)
        with self.opened():
            if scattered is not None:
                self._add_state(scattered)
            elif parts is not None:
                self._merge_parts(parts)
            else:
                self._scatter([x for x in lines if x["kind"] == "rows"])
            with self._parts_opened([] if self.by_column else parts or []):
                self._finish([x for x in lines if x["kind"] == "bucket"])
            self.sums = np.empty((0, 0), np.int64)  # before the tables are made
            self.over.clear()
        trim_heap()
        write_tables(self)
        write_manifest(self)

    def _merge_parts(self, parts: list[dict[str, Any]]) -> None:
        """Add up what the parts of a cluster found."""
        if self.by_column:
            from vcelltools.pipelines.cluster_genes import merge_parts

            merge_parts(self, parts)
            self.checkpoint("scattered")
            return
        for line in parts:
            self._add_state(line, self.parts_dpath)
            a, z = line["part"]
            self.libsize[a:z] = np.load(self.parts_dpath / line["libsize"], allow_pickle=False)
        trim(self.libsize)  # dirty pages stay with the file, whose fd is flushed
        self.checkpoint("scattered", parts=parts)

    @contextmanager
    def _parts_opened(self, parts: list[dict[str, Any]]) -> Iterator[None]:
        """Open the rows that the parts of a cluster wrote."""
        try:
            for line in parts:
                slots = self.slot_of_cell[slice(*line["part"])]
                fd = os.open(self.parts_dpath / line["rows"], os.O_RDONLY)
                self.part_rows.append((np.sort(slots[slots >= 0]), fd))
            yield
        finally:
            for _, fd in self.part_rows:
                os.close(fd)
            self.part_rows.clear()

    def _scatter(self, done: list[dict[str, Any]]) -> None:
        """Pass one, from where the journal says it got."""
        first = 0
        if done:
            first = int(done[-1]["rows"])
            self._add_state(done[-1])
        if self.by_column:
            scatter_columns(self, first)
        else:
            scatter_rows(self, first)
        self.checkpoint("scattered")

    def _resume(self) -> list[dict[str, Any]]:
        lines = self.journal.read()
        first = {"kind": "plan", "plan": self.fingerprint, "edges": hashlib.sha256(self.edges.tobytes()).hexdigest()}
        if lines and lines[0] == first and (self.dpath / "X.f16").exists():
            self.journal.rewrite(lines)
            if len(lines) > 1:
                self.progress.note(f"continuing {self.dpath.parent / self.plan.spec.name} where it stopped")
            return lines[1:]
        shutil.rmtree(self.dpath, ignore_errors=True)
        self._remove_parts()
        self.dpath.mkdir(parents=True)
        step("folder")
        with open(self.dpath / "X.f16", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, self.n * self.row_bytes)
        step("allocated")
        self.journal.append(first)
        return []

    @contextmanager
    def opened(self, dpath: Path | None = None, rows: tuple[int, int] | None = None) -> Iterator[None]:
        """Open the files that passes write to, with empty sums.

        ``rows`` is for a worker of a cluster, which scatters just these cells into files of its own in ``dpath``.
        """
        d = dpath or self.dpath
        flags = os.O_RDWR | os.O_CREAT
        n_cells = self.ds.n_cells
        self.x_fd = os.open(d / "X.f16", flags, 0o644)
        self.lib_fd = os.open(d / "libsize.work", flags, 0o644)
        self.columns_fd = os.open(d / "columns.work", flags, 0o644)
        try:
            if self.by_column:
                os.truncate(self.columns_fd, 2 * self.n * self.plan.n_basis)
            os.ftruncate(self.lib_fd, 8 * n_cells)
            self.libsize: np.ndarray = np.memmap(d / "libsize.work", np.int64, "r+", shape=(n_cells,))
            self.sums = self._make_sums(d)
            self.over: list[np.ndarray] = []
            self.duplicates = 0
            self.slot_of_cell = self._get_slots() if rows is None else self._get_places(*rows)
            yield
        finally:
            for fd in (self.x_fd, self.lib_fd, self.columns_fd):
                os.close(fd)

    def _get_places(self, start: int, stop: int) -> np.ndarray:
        """(cells,) int32: the rank of each cell's work row among those of the cells ``start:stop``."""
        slots = self._get_slots()[start:stop]
        kept = np.flatnonzero(slots >= 0)
        out = np.full(self.ds.n_cells, -1, np.int32)
        out[start + kept[np.argsort(slots[kept])]] = np.arange(len(kept), dtype=np.int32)
        return out

    def _make_sums(self, dpath: Path) -> np.ndarray:
        shape = (self.plan.order.n_groups, len(self.measured))
        if self.sums_fit:
            return np.zeros(shape, np.int64)
        path = dpath / "sums.work"
        path.unlink(missing_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)

    @property
    def rows_at_once(self) -> int:
        """Rows of the sums that are touched between two :meth:`trim_sums`."""
        if not isinstance(self.sums, np.memmap):
            return max(1, len(self.sums), self.ds.n_cells)
        return max(1, MAPPED_SUMS // max(8 * self.sums.shape[1], 1))

    def trim_sums(self) -> None:
        """Hand the pages of a table on disk back to the page cache, so that they do not count as ours."""
        trim(self.sums)

    def iterate_sums(self) -> Iterator[slice]:
        """Yield ranges of rows of the sums, trimmed after each."""
        for a in range(0, len(self.sums), self.rows_at_once):
            yield slice(a, min(a + self.rows_at_once, len(self.sums)))
            self.trim_sums()

    def checkpoint(self, kind: str, **more: Any) -> None:
        """Note in the journal how far pass one got."""
        facts = self.save_state(f"state.{len(self.journal.read())}.work")
        self.journal.append({"kind": kind, **facts, **more})
        for old in self.dpath.glob("state.*.work"):
            if old.name != facts["state"]:
                old.unlink()

    def save_state(self, name: str, dpath: Path | None = None) -> dict[str, Any]:
        """Flush what was written, and keep sums and large counts in a file; return the journal's facts about it."""
        for fd in (self.x_fd, self.lib_fd, self.columns_fd):
            os.fdatasync(fd)
        over = np.concatenate(self.over) if self.over else np.empty((0, 3), np.int64)
        d = dpath or self.dpath
        tmp = d / "state.tmp.work"
        with open(tmp, "wb") as f:
            np.save(f, over)
            for rows in self.iterate_sums():
                f.write(np.ascontiguousarray(self.sums[rows]).data)
            f.flush()
            os.fsync(f.fileno())
        step("state")
        os.replace(tmp, d / name)
        return {"state": name, "duplicates": self.duplicates}

    def _add_state(self, line: dict[str, Any], dpath: Path | None = None) -> None:
        """Add what a state file keeps."""
        self.duplicates += int(line["duplicates"])
        with open((dpath or self.dpath) / line["state"], "rb") as f:
            over = np.load(f, allow_pickle=False)
            if len(over):
                self.over.append(over)
            for rows in self.iterate_sums():
                part = self.sums[rows]
                part += np.fromfile(f, np.int64, part.size).reshape(part.shape)

    # -- pass two: buckets ---------------------------------------------------------------------------------------

    def _finish(self, done: list[dict[str, Any]]) -> None:
        plan = self.plan
        self.over_sorted = merge_over(self.over)
        self.slot_of_cell = np.empty(0, np.int32)  # all that follows is in store order
        if not isinstance(self.ds.matrix, DenseMatrix):
            self.ds.matrix.forget()
        lib = to_smallest(self.libsize)[plan.order.source]
        self.libsize, self.known_libsize = np.empty(0, np.int64), None
        trim_heap()
        n_buckets = len(self.edges) - 1
        counts = open(self.dpath / "counts.u8z", "r+b" if done else "w+b", buffering=0)  # noqa: SIM115
        sizes_path = self.dpath / "frames.work"
        sizes = np.empty(len(self.frame_starts) - 1, np.int64)
        n_sizes = int(done[-1]["frames"]) if done else 0
        if done:
            sizes[:n_sizes] = np.fromfile(sizes_path, np.int64, n_sizes)
            counts.truncate(int(sizes[:n_sizes].sum()))
        sizes_file = open(sizes_path, "r+b" if done else "w+b", buffering=0)  # noqa: SIM115
        sizes_file.truncate(8 * n_sizes)
        hasher = UnitHasher(self.n)
        ready: list[tuple[int, np.ndarray, bytes | None, np.ndarray | None]] = []

        def commit() -> None:
            """Frames first, flushed and journalled; only then values over the work rows that they come from."""
            nonlocal n_sizes
            new = [x for x in ready if x[2] is not None]
            if new:
                counts.seek(0, os.SEEK_END)
                sizes_file.seek(0, os.SEEK_END)
                for _, _, blob, frame_sizes in new:
                    assert blob is not None and frame_sizes is not None
                    write_all(counts, blob)
                    write_all(sizes_file, frame_sizes.tobytes())
                    sizes[n_sizes : n_sizes + len(frame_sizes)] = frame_sizes
                    n_sizes += len(frame_sizes)
                os.fdatasync(counts.fileno())
                os.fdatasync(sizes_file.fileno())
                step("frames")
                last = np.searchsorted(self.frame_starts, [self.edges[k + 1] for k, *_ in new]).tolist()
                self.journal.append(
                    *({"kind": "bucket", "bucket": x[0], "frames": n} for x, n in zip(new, last, strict=True))
                )
            for k, values, _, _ in ready:
                pwrite_all(self.x_fd, values, int(self.edges[k]) * self.row_bytes)
                step("values")
                hasher.update(values)
                self.progress.advance(int(self.edges[k + 1] - self.edges[k]))
            ready.clear()

        self.progress.start("rows", self.n, "cells")
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                waiting: deque[tuple[int, Future]] = deque()
                todo = iter(range(n_buckets))
                while True:
                    while len(waiting) < self.threads + 1 and (k := next(todo, None)) is not None:
                        job = self._redo_bucket if k < len(done) else self._make_bucket
                        args = (k, lib, sizes, counts.fileno()) if k < len(done) else (k, lib)
                        waiting.append((k, pool.submit(job, *args)))
                    if not waiting:
                        break
                    k, future = waiting.popleft()
                    ready.append((k, *future.result()))
                    if sum(x[1].nbytes for x in ready) >= COMMIT_BUCKETS * self.bucket_bytes:
                        commit()
                commit()
        finally:
            counts.close()
            sizes_file.close()
        os.fdatasync(self.x_fd)
        self.progress.finish()
        offsets = np.append(0, np.cumsum(sizes))
        save_array(self.dpath / "frames.npy", np.stack([self.frame_starts, offsets]))
        save_array(self.dpath / "X.xxh3.npy", hasher.finish())
        save_array(self.dpath / "libsize.npy", lib.astype(np.int64))
        self._save_sums()

    def _make_bucket(self, k: int, lib: np.ndarray) -> tuple[np.ndarray, bytes, np.ndarray]:
        """Return (value rows, frames, size of each frame) of a bucket."""
        a, b = int(self.edges[k]), int(self.edges[k + 1])
        work, row_of = self._read_work(a, b)
        packed, escapes, values = self._turn(work, row_of, lib[a:b].astype(np.int64), self._get_over(a, b))
        f0, f1 = np.searchsorted(self.frame_starts, [a, b])
        blob, sizes = encode_frames(packed, escapes, self.frame_starts[f0 : f1 + 1] - a)
        return values, blob, sizes

    def _read_work(self, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (work rows, the work row of each store row) of a bucket."""
        if self.by_column:
            block = np.empty((self.plan.n_basis, b - a), np.uint16)
            for p in range(self.plan.n_basis):
                pread_into(self.columns_fd, block[p], 2 * (p * self.n + a), str(self.dpath / "columns.work"))
            return np.ascontiguousarray(block.T), np.arange(b - a)
        work = np.empty((b - a, self.stride), np.uint16)
        if self.part_rows:
            for slots, fd in self.part_rows:
                i, j = np.searchsorted(slots, [a, b])
                if i < j:
                    rows = np.empty((j - i, self.stride), np.uint16)
                    pread_into(fd, rows, int(i) * self.row_bytes, str(self.parts_dpath))
                    work[slots[i:j] - a] = rows
        else:
            pread_into(self.x_fd, work, a * self.row_bytes, str(self.dpath / "X.f16"))
        row_of = np.empty(b - a, np.int64)
        row_of[np.argsort(self.plan.order.source[a:b])] = np.arange(b - a)
        return work, row_of

    def _redo_bucket(self, k: int, lib: np.ndarray, sizes: np.ndarray, fd: int):
        """Return the value rows of a bucket whose frames are written, from those frames."""
        a, b = int(self.edges[k]), int(self.edges[k + 1])
        f0, f1 = np.searchsorted(self.frame_starts, [a, b])
        at = int(sizes[:f0].sum())
        work = np.zeros((b - a, self.stride), np.uint16)
        over = []
        for f in range(f0, f1):
            raw = os.pread(fd, int(sizes[f]), at)
            at += int(sizes[f])
            r0, r1 = int(self.frame_starts[f]) - a, int(self.frame_starts[f + 1]) - a
            counts = np.empty((r1 - r0, self.plan.n_basis), np.uint32)
            decode_frame(raw, counts, where=f"{self.dpath}/counts.u8z: frame {f}")
            over.append(fill_work(work[r0:r1], counts, r0))
        _, _, values = self._turn(work, np.arange(b - a), lib[a:b].astype(np.int64), np.concatenate(over))
        return values, None, None

    def _get_over(self, a: int, b: int) -> np.ndarray:
        i, j = np.searchsorted(self.over_sorted[:, 0], [a, b])
        out = self.over_sorted[i:j].copy()
        out[:, 0] -= a
        return out

    def _turn(self, work, row_of, lib, over) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (packed rows, escapes, value rows) of work rows."""
        m, n_basis = len(row_of), self.plan.n_basis
        packed = np.empty((m, n_basis), np.uint8)
        values = np.empty((m, self.stride), np.uint16)
        escapes = np.empty((4 * m, 3), np.int64)
        while True:
            n = kernels.finish_rows(
                work, row_of, lib, over, n_basis, self.plan.target_sum, self.single, packed, escapes, values
            )
            if n < 0:
                raise DataError(
                    f"{self.ds.label}: a cell's library size by {self.plan.libsize_from} is less than the sum of its "
                    f"basis genes ({int(lib[-n - 1]):,})",
                    hint="name the column of total counts, or leave library_size out",
                )
            if n <= len(escapes):
                return packed, escapes[:n], values
            escapes = np.empty((n, 3), np.int64)

    def _save_sums(self) -> None:
        path = self.dpath / "sums.npy"
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f8")), "fortran_order": False}
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {**header, "shape": self.sums.shape})
            for rows in self.iterate_sums():
                f.write((self.sums[rows] / kernels.FIXED_ONE).data)
        fsync_path(path)
        step("sums")

    def is_complete(self) -> bool:
        """Say whether the folder holds the whole store of this plan, only not yet at its name."""
        try:
            return read_manifest(self.dpath)["plan"] == self.fingerprint
        except DataError:
            return False

    def publish(self, target: Path) -> None:
        """Give the finished folder its name."""
        for path in (p for p in self.dpath.iterdir() if p.name not in (*PARTS, "X.f16", MANIFEST)):
            path.unlink()
        step("publish")
        self._remove_parts()
        replace_folder(self.dpath, target)
