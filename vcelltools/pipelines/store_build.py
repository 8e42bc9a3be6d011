"""Building a store: one pass over the source, then one over the store, each resumable.

Pass one scatters the basis counts of every cell, as uint16 work rows, into the place in ``X.f16`` where its bucket
(some thousand neighbouring store rows) will lie, and adds up library sizes and sums. Pass two takes one bucket
after the other: sorts its rows, appends their exact counts to ``counts.u8z``, and only then turns the same place
of ``X.f16`` into values. So the disk holds nothing twice, memory holds some buckets, and a bucket that a crash
left half turned is made again from its counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.chunks import CsrChunk, DenseChunk
from vcelltools.errors import DataError, NotCountsError
from vcelltools.io import CscMatrix, CsrMatrix, Dataset, DenseMatrix
from vcelltools.io.arrays import pread_into
from vcelltools.io.atomic import dump_json, fsync_path, replace_folder, step
from vcelltools.kernels import store as kernels
from vcelltools.pipelines.store_format import (
    MANIFEST,
    PARTS,
    SCHEMA,
    decode_frame,
    encode_frame,
    get_frame_starts,
    get_stride,
    hash_file,
    hash_units,
    make_compressor,
    make_manifest,
    read_manifest,
)
from vcelltools.pipelines.store_plan import StorePlan
from vcelltools.pipelines.store_verify import fill_work
from vcelltools.progress import SILENT, Progress
from vcelltools.stream import get_threads, run_spans

BUCKET_BYTES = 16 << 20
CHUNK_VALUES = 1 << 21
CHECKPOINT_SECONDS = 10.0
_IN_MEMORY_SUMS = 96 << 20
_OVER_CAP = 1 << 16


class Journal:
    """Lines of JSON, each with its own hash; a torn last line is as if it had never been written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines."""
        from xxhash import xxh3_64_hexdigest

        lines: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            for raw in self.path.read_bytes().split(b"\n"):
                digest, _, text = raw.partition(b" ")
                if not text or digest.decode("ascii", "replace") != xxh3_64_hexdigest(text):
                    break
                lines.append(json.loads(text))
        return lines

    def rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Keep just these lines, so that new ones follow a whole one."""
        tmp = self.path.with_suffix(".tmp")
        tmp.write_bytes(b"".join(self._encode(x) for x in lines))
        fsync_path(tmp)
        os.replace(tmp, self.path)
        fsync_path(self.path.parent)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line and flush it to the disk."""
        step("journal")
        with open(self.path, "ab") as f:
            f.write(self._encode(line))
            f.flush()
            os.fsync(f.fileno())
        step("journalled")

    @staticmethod
    def _encode(line: dict[str, Any]) -> bytes:
        from xxhash import xxh3_64_hexdigest

        text = dump_json(line).encode()
        return xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def raise_status(status: np.ndarray, value: Any, gene: int, *, where: str, cell: int) -> None:
    """Turn a kernel's status into the error that it stands for."""
    code = int(status[0])
    at = f"cell {cell:,}, gene {gene:,}"
    if code == kernels.BAD_INDEX:
        raise DataError(f"{where}: an index is out of range near {at} ({value})", hint="the file is damaged")
    if code == kernels.NOT_FINITE:
        raise DataError(f"{where}: {value} at {at}", hint="counts are finite")
    if code == kernels.NEGATIVE:
        raise DataError(f"{where}: the negative value {value} at {at}", hint="pass the layer that holds raw counts")
    if code == kernels.NOT_INTEGER:
        raise NotCountsError(
            f"{where} does not hold counts: {value} at {at}",
            hint="pass the layer or modality that holds raw counts (--layer, --modality)",
        )
    if code == kernels.TOO_LARGE:
        raise DataError(f"{where}: {value} at {at} is above the largest count, {kernels.MAX_COUNT:,}")
    if code == kernels.LIST_FULL:
        raise DataError(f"{where}: more than {_OVER_CAP:,} counts of 65,535 and above in one chunk, near {at}")


def to_rows(chunk: CsrChunk | DenseChunk) -> CsrChunk:
    """Return a chunk of whole cells as CSR."""
    if isinstance(chunk, CsrChunk):
        return chunk
    block = chunk.block
    rows, cols = np.nonzero(block)
    indptr = np.zeros(len(block) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(block)), out=indptr[1:])
    return CsrChunk(
        start=chunk.row_start,
        indptr=indptr,
        indices=cols.astype(np.int32),
        data=np.ascontiguousarray(block[rows, cols]),
        n_genes=block.shape[1],
    )


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
        progress: Progress = SILENT,
    ) -> None:
        self.plan, self.ds, self.dpath = plan, ds, dpath
        self.source = source
        self.threads = get_threads(threads)
        self.chunk_values = chunk_values
        self.checkpoint_seconds = checkpoint_seconds
        self.progress = progress
        self.n = plan.order.n
        self.stride = get_stride(plan.n_basis)
        self.row_bytes = self.stride * 2
        self.single = np.dtype(ds.matrix.dtype) != np.float64
        lengths = plan.order.runs["length"].to_numpy()
        self.frame_starts = get_frame_starts(lengths)
        self.edges = self._get_edges(max(16, bucket_bytes // self.row_bytes))
        self.slot_of_cell = self._get_slots()
        self.measured = self._get_measured()
        self.journal = Journal(dpath / "journal")
        self.duplicates = 0
        self._lock = threading.Lock()

    def _get_edges(self, bucket_rows: int) -> np.ndarray:
        """Bucket boundaries: frame starts, about ``bucket_rows`` apart."""
        at = np.searchsorted(self.frame_starts, np.arange(0, self.n, bucket_rows))
        return np.append(np.unique(self.frame_starts[at]), self.n)

    def _get_slots(self) -> np.ndarray:
        """(cells,) int64: the work row of each source cell: its bucket, then source order; -1 where left out."""
        slots = np.full(len(self.plan.order.row_of_cell), -1, np.int64)
        for a, b in zip(self.edges[:-1], self.edges[1:], strict=True):
            slots[np.sort(self.plan.order.source[a:b])] = np.arange(a, b)
        return slots

    def _get_measured(self) -> np.ndarray:
        """Genes of the file (merged) whose sums are kept, in order."""
        merged = self.plan.match.merged
        if self.sums_mode == "basis":
            return self.plan.match.gene_of[self.plan.match.present].astype(np.int64)
        return np.arange(len(merged.ids), dtype=np.int64)

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
        sums = 8 * self.plan.order.n_groups * len(self.measured)
        return self.n * (self.row_bytes + self.plan.n_basis // 3 + 300) + 4 * sums

    def describe(self) -> dict[str, Any]:
        """Return what would be built and how, without reading counts."""
        plan, m = self.plan, self.ds.matrix
        runs = plan.order.runs
        sums = 8 * plan.order.n_groups * len(self.measured)
        per_thread = 12 * self.chunk_values + 4 * (self.edges[1] - self.edges[0]) * self.row_bytes
        return {
            "name": plan.spec.name,
            "source": self.ds.label,
            "layout": m.layout,
            "passes": self.describe_passes(),
            "bytes_to_read": m.stored_bytes,
            "cells": self.n,
            "of_cells": self.ds.n_cells,
            "left_out": plan.labels.dropped,
            "cell_lines": plan.labels.lines,
            "perturbations": len(plan.labels.perturbations) - 1,
            "contexts": len(plan.labels.contexts),
            "runs": len(runs),
            "controls": int(runs.loc[runs["is_control"], "length"].sum()),
            "smallest_group": int(runs["length"].min()),
            "groups_too_small": len(plan.labels.small),
            "genes": plan.match.describe(),
            "disk_bytes": self.disk_bytes,
            "memory_bytes": int(self.threads * per_thread + min(sums, _IN_MEMORY_SUMS) + 64 * self.ds.n_cells),
        }

    def describe_passes(self) -> str:
        """Return, in words, how often the source is read, and what of it."""
        return "one pass over all counts"

    @property
    def fingerprint(self) -> str:
        """What the bytes of the store depend on, hashed; a journal of other bytes is not continued."""
        import zstandard

        from vcelltools import __version__

        order = self.plan.order
        parts = {
            "schema": SCHEMA,
            "version": __version__,
            "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
            "source": self.source,
            "basis": self.plan.basis.sha256,
            "target_sum": self.plan.target_sum,
            "single": self.single,
            "sums": self.sums_mode,
            "edges": hashlib.sha256(self.edges.tobytes()).hexdigest(),
            "order": hashlib.sha256(order.source.tobytes()).hexdigest(),
            "groups": hashlib.sha256(order.group_of_cell.tobytes()).hexdigest(),
            "columns": hashlib.sha256(self.plan.basis_of_column.tobytes()).hexdigest(),
            "measured": hashlib.sha256(self.plan.match.merged.of_column.tobytes()).hexdigest(),
            "library_size": self.plan.spec.library_size,
        }
        return hashlib.sha256(dump_json(parts).encode()).hexdigest()

    # -- the road ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Build up to the manifest, continuing where an earlier run of the same plan stopped."""
        lines = self._resume()
        with self._open_files():
            scattered = next((x for x in lines if x["kind"] == "scattered"), None)
            if scattered is None:
                self._scatter([x for x in lines if x["kind"] == "rows"])
            else:
                self._load_sums(scattered)
            self._finish([x for x in lines if x["kind"] == "bucket"])
        self._write_tables()
        self._write_manifest()

    def _resume(self) -> list[dict[str, Any]]:
        lines = self.journal.read()
        if lines and lines[0].get("plan") == self.fingerprint and (self.dpath / "X.f16").exists():
            self.journal.rewrite(lines)
            if len(lines) > 1:
                self.progress.note(f"continuing {self.dpath.parent / self.plan.spec.name} where it stopped")
            return lines[1:]
        shutil.rmtree(self.dpath, ignore_errors=True)
        self.dpath.mkdir(parents=True)
        step("folder")
        with open(self.dpath / "X.f16", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, self.n * self.row_bytes)
        step("allocated")
        self.journal.append({"kind": "plan", "plan": self.fingerprint})
        return []

    @contextmanager
    def _open_files(self) -> Iterator[None]:
        n_cells = self.ds.n_cells
        self.x_fd = os.open(self.dpath / "X.f16", os.O_RDWR)
        self.lib_fd = os.open(self.dpath / "libsize.work", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(self.lib_fd, 8 * n_cells)
            self.libsize = np.zeros(n_cells, np.int64)
            pread_into(self.lib_fd, self.libsize, 0, str(self.dpath / "libsize.work"))
            self.sums = self._make_sums()
            self.over: list[np.ndarray] = []
            yield
        finally:
            os.close(self.x_fd)
            os.close(self.lib_fd)

    def _make_sums(self) -> np.ndarray:
        shape = (self.plan.order.n_groups, len(self.measured))
        if 8 * shape[0] * shape[1] <= _IN_MEMORY_SUMS:
            return np.zeros(shape, np.int64)
        path = self.dpath / "sums.work"
        path.unlink(missing_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)

    # -- pass one: rows ------------------------------------------------------------------------------------------

    def _scatter(self, done: list[dict[str, Any]]) -> None:
        if self.by_column:
            from vcelltools.pipelines.store_columns import scatter_columns

            scatter_columns(self, done)
            return
        matrix = self.ds.matrix
        assert isinstance(matrix, CsrMatrix | DenseMatrix)
        start = 0
        if done:
            start = int(done[-1]["rows"])
            self._load_sums(done[-1])
        columns = self._get_measured_of_column()
        spans = matrix.plan(max_values=self.chunk_values, start=start)
        self.progress.start("counts", sum(s.n_bytes for s in spans), "bytes")
        group = max(4 * self.threads, 16)
        said, cost = time.monotonic(), 0.0
        for i in range(0, len(spans), group):
            some = spans[i : i + group]
            run_spans(
                matrix,
                some,
                dict,
                lambda state, chunk, span: self._visit(state, to_rows(chunk), columns),
                threads=self.threads,
                progress=self.progress,
            )
            self._trim_sums()
            if i + group < len(spans) and time.monotonic() - said > max(self.checkpoint_seconds, 20 * cost):
                began = time.monotonic()
                self._checkpoint("rows", rows=some[-1].stop)
                said = time.monotonic()
                cost = said - began
        self.progress.finish()
        self._checkpoint("scattered")

    def _get_measured_of_column(self) -> np.ndarray:
        """(columns,) int32: the column of the sums, or one past the last where there is none."""
        merged = self.plan.match.merged
        of_gene = np.full(len(merged.ids), -1, np.int32)
        of_gene[self.measured] = np.arange(len(self.measured))
        return of_gene[merged.of_column]

    def _visit(self, state: dict[str, Any], chunk: CsrChunk, measured: np.ndarray) -> None:
        """Scatter one chunk of cells."""
        b = chunk.n_rows
        cells = slice(chunk.start, chunk.start + b)
        slots = self.slot_of_cell[cells]
        kept = np.flatnonzero(slots >= 0)
        by_slot = kept[np.argsort(slots[kept])]
        out_row = np.full(b, -1, np.int64)
        out_row[by_slot] = np.arange(len(by_slot))
        work = _take(state, "work", (len(by_slot), self.stride), np.uint16)
        over = _take(state, "over", (_OVER_CAP, 3), np.int64)
        libsize = np.zeros(b, np.int64)
        status = np.zeros(5, np.int64)
        kernels.csr_fill_work(
            chunk.indptr,
            chunk.indices,
            chunk.data,
            self.plan.basis_of_column,
            out_row,
            libsize,
            work,
            over,
            status,
        )
        if status[0]:
            j = int(status[2])
            bad_index = status[0] == kernels.BAD_INDEX
            value = chunk.indices[j] if bad_index else chunk.data[j]
            raise_status(
                status,
                value,
                int(chunk.indices[j]),
                where=self.ds.matrix.where,
                cell=chunk.start + int(status[1]),
            )
        self.libsize[cells] = libsize
        os.pwrite(self.lib_fd, libsize, 8 * chunk.start)
        self._write_work(work, slots[by_slot])
        if status[3]:
            found = over[: int(status[3])].copy()
            found[:, 0] = self.plan.order.row_of_cell[cells][by_slot][found[:, 0]]
            with self._lock:
                self.over.append(found)
        self._add_sums(state, chunk, libsize, cells, measured, unsorted=bool(status[4]))

    def _write_work(self, work: np.ndarray, slots: np.ndarray) -> None:
        """Write work rows to their places; neighbours go in one write."""
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        first = np.append(0, cuts)
        last = np.append(cuts, len(slots))
        for a, z in zip(first.tolist(), last.tolist(), strict=True):
            if z > a:
                pwrite_all(self.x_fd, work[a:z], int(slots[a]) * self.row_bytes)

    def _add_sums(self, state, chunk: CsrChunk, libsize, cells: slice, measured: np.ndarray, *, unsorted: bool) -> None:
        group = self.plan.order.group_of_cell[cells]
        indptr, indices, data = chunk.indptr, chunk.indices, chunk.data
        injective = len(measured) == len(self.measured)
        if unsorted or not injective or (measured < 0).any():
            indptr, indices, data = self._canonicalise(chunk, measured)
            measured = np.arange(len(self.measured), dtype=np.int32)
        scale = self.plan.target_sum / np.maximum(libsize, 1)
        fixed = _take(state, "fixed", (len(data),), np.int32)
        kernels.csr_fixed_logs(indptr, data, scale, fixed)
        with self._lock:
            kernels.csr_add_sums(indptr, indices, fixed, group, measured, self.sums)

    def _canonicalise(self, chunk: CsrChunk, measured: np.ndarray):
        """Map columns to measured genes and add up what falls together in one cell."""
        from scipy import sparse

        mapped = measured[chunk.indices]
        keep = mapped >= 0
        indptr = np.append(0, np.cumsum(keep))[chunk.indptr]
        m = sparse.csr_matrix(
            (chunk.data[keep].astype(np.int64), mapped[keep], indptr), shape=(chunk.n_rows, len(self.measured))
        )
        before = m.nnz
        m.sum_duplicates()
        with self._lock:
            self.duplicates += before - m.nnz
        return m.indptr.astype(np.int64), m.indices.astype(np.int32), m.data

    def _trim_sums(self) -> None:
        """Hand the pages of a file-backed table back to the page cache, so that they do not count as ours."""
        base = getattr(self.sums, "_mmap", None)
        if base is not None and hasattr(base, "madvise"):
            import mmap

            base.madvise(mmap.MADV_DONTNEED)

    def _checkpoint(self, kind: str, **more: Any) -> None:
        """Flush pass one and note in the journal how far it got."""
        os.fdatasync(self.x_fd)
        os.fdatasync(self.lib_fd)
        number = len(self.journal.read())
        name = f"state.{number}.work"
        over = np.concatenate(self.over) if self.over else np.empty((0, 3), np.int64)
        with open(self.dpath / name, "wb") as f:
            np.save(f, over)
            self.sums.tofile(f)
            f.flush()
            os.fsync(f.fileno())
        step("state")
        self.journal.append({"kind": kind, "state": name, "duplicates": self.duplicates, **more})
        for old in self.dpath.glob("state.*.work"):
            if old.name != name:
                old.unlink()

    def _load_sums(self, line: dict[str, Any]) -> None:
        self.duplicates = int(line["duplicates"])
        with open(self.dpath / line["state"], "rb") as f:
            over = np.load(f, allow_pickle=False)
            self.over = [over] if len(over) else []
            for k in range(len(self.sums)):
                self.sums[k] = np.fromfile(f, np.int64, self.sums.shape[1])

    # -- pass two: buckets ---------------------------------------------------------------------------------------

    def _finish(self, done: list[dict[str, Any]]) -> None:
        plan = self.plan
        self.over_sorted = _merge_over(self.over)
        lib = self.libsize[plan.order.source]
        n_buckets = len(self.edges) - 1
        counts = open(self.dpath / "counts.u8z", "r+b" if done else "w+b", buffering=0)  # noqa: SIM115
        sizes_path = self.dpath / "frames.work"
        sizes: list[np.ndarray] = []
        if done:
            old = np.fromfile(sizes_path, np.int64)[: int(done[-1]["frames"])]
            sizes.append(old)
            counts.truncate(int(old.sum()))
        sizes_file = open(sizes_path, "r+b" if done else "w+b", buffering=0)  # noqa: SIM115
        sizes_file.truncate(8 * sum(len(s) for s in sizes))
        hasher = UnitHasher()
        self.progress.start("rows", self.n, "cells")
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                waiting: deque[tuple[int, Future]] = deque()
                todo = iter(range(n_buckets))
                while True:
                    while len(waiting) < self.threads + 1 and (k := next(todo, None)) is not None:
                        job = self._redo_bucket if k < len(done) else self._make_bucket
                        args = (k, lib, sizes[0], counts.fileno()) if k < len(done) else (k, lib)
                        waiting.append((k, pool.submit(job, *args)))
                    if not waiting:
                        break
                    k, future = waiting.popleft()
                    values, blob, frame_sizes = future.result()
                    if blob is not None:
                        counts.seek(0, os.SEEK_END)
                        write_all(counts, blob)
                        sizes_file.seek(0, os.SEEK_END)
                        write_all(sizes_file, frame_sizes.tobytes())
                        os.fdatasync(counts.fileno())
                        os.fdatasync(sizes_file.fileno())
                        step("frames")
                        n_frames = int(np.searchsorted(self.frame_starts, self.edges[k + 1]))
                        self.journal.append({"kind": "bucket", "bucket": k, "frames": n_frames})
                        sizes.append(frame_sizes)
                    pwrite_all(self.x_fd, values, int(self.edges[k]) * self.row_bytes)
                    step("values")
                    hasher.update(values)
                    self.progress.advance(int(self.edges[k + 1] - self.edges[k]))
                    del values, blob
        finally:
            counts.close()
            sizes_file.close()
        os.fdatasync(self.x_fd)
        self.progress.finish()
        offsets = np.append(0, np.cumsum(np.concatenate(sizes)))
        save_array(self.dpath / "frames.npy", np.stack([self.frame_starts, offsets]))
        save_array(self.dpath / "X.xxh3.npy", hasher.finish())
        save_array(self.dpath / "libsize.npy", lib)
        self._save_sums()

    def _make_bucket(self, k: int, lib: np.ndarray) -> tuple[np.ndarray, bytes, np.ndarray]:
        """Return (value rows, frames, size of each frame) of a bucket."""
        a, b = int(self.edges[k]), int(self.edges[k + 1])
        work, row_of = self._read_work(a, b)
        packed, escapes, values = self._turn(work, row_of, lib[a:b], self._get_over(a, b))
        compressor = make_compressor()
        f0, f1 = np.searchsorted(self.frame_starts, [a, b])
        frames = []
        edges = np.searchsorted(escapes[:, 0], self.frame_starts[f0 : f1 + 1] - a)
        for i, f in enumerate(range(f0, f1)):
            r0, r1 = int(self.frame_starts[f]) - a, int(self.frame_starts[f + 1]) - a
            e = escapes[edges[i] : edges[i + 1]]
            pairs = np.column_stack([(e[:, 0] - r0) * self.plan.n_basis + e[:, 1], e[:, 2]])
            frames.append(encode_frame(compressor, packed[r0:r1], pairs))
        return values, b"".join(frames), np.array([len(f) for f in frames], np.int64)

    def _read_work(self, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (work rows, the work row of each store row) of a bucket."""
        work = np.empty((b - a, self.stride), np.uint16)
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
            packed, escapes = decode_frame(raw, r1 - r0, self.plan.n_basis, where=f"{self.dpath}/counts.u8z frame {f}")
            over.append(fill_work(work[r0:r1], packed, escapes, r0))
        _, _, values = self._turn(work, np.arange(b - a), lib[a:b], np.concatenate(over))
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
            if n <= len(escapes):
                return packed, escapes[:n], values
            escapes = np.empty((n, 3), np.int64)

    def _save_sums(self) -> None:
        path = self.dpath / "sums.npy"
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=self.sums.shape)
        for k in range(len(self.sums)):
            out[k] = self.sums[k] / kernels.FIXED_ONE
        out.flush()
        del out
        fsync_path(path)
        step("sums")

    # -- the end -------------------------------------------------------------------------------------------------

    def _write_tables(self) -> None:
        import pandas as pd

        plan = self.plan
        merged, order = plan.match.merged, plan.order
        columns: list[list[str]] = [[] for _ in range(len(merged.ids))]
        index = self.ds.var.index
        for j, g in enumerate(merged.of_column.tolist()):
            columns[g].append(str(index[j]))
        gene_of = plan.match.gene_of
        genes = pd.DataFrame(
            {
                "gene": list(plan.basis.labels),
                "id": [
                    merged.ids[g] if g >= 0 and merged.ids[g] else i
                    for g, i in zip(gene_of, plan.basis.ids, strict=True)
                ],
                "symbol": [
                    s or (merged.names[g] if g >= 0 else None) for g, s in zip(gene_of, plan.basis.symbols, strict=True)
                ],
                "columns": ["|".join(columns[g]) if g >= 0 else "" for g in gene_of],
                "present": plan.match.present,
                "how": list(plan.match.how),
            }
        )
        measured = pd.DataFrame({"id": merged.ids[self.measured], "symbol": merged.names[self.measured]})
        basis_row = np.full(len(merged.ids), -1, np.int32)
        basis_row[gene_of[plan.match.present]] = np.flatnonzero(plan.match.present)
        measured["basis"] = basis_row[self.measured]
        obs = self.ds.obs.to_frame().iloc[order.source]
        obs.insert(0, "source_row", order.source) if "source_row" not in obs else None
        for name, frame in (("genes", genes), ("measured", measured), ("runs", order.runs), ("cells", obs)):
            write_parquet(self.dpath / f"{name}.parquet", frame, index=name == "cells")
            step(f"table {name}")

    def _write_manifest(self) -> None:
        from vcelltools import __version__

        plan = self.plan
        for path in self.dpath.glob("*.work"):
            path.unlink()
        files = {
            name: {"bytes": (self.dpath / name).stat().st_size, "sha256": hash_file(self.dpath / name)}
            for name in PARTS
        }
        files["X.f16"] = {"bytes": self.n * self.row_bytes}
        body = {
            "schema": SCHEMA,
            "name": plan.spec.name,
            "plan": self.fingerprint,
            "n_cells": self.n,
            "n_genes": plan.n_basis,
            "stride": self.stride,
            "n_runs": len(plan.order.runs),
            "n_groups": plan.order.n_groups,
            "target_sum": plan.target_sum,
            "arithmetic": "float32" if self.single else "float64",
            "seed": plan.seed,
            "basis": {"sha256": plan.basis.sha256, "n": plan.n_basis},
            "library_size": {"from": plan.spec.library_size, "n_genes": self.ds.n_genes},
            "sums": {"genes": self.sums_mode, "n": len(self.measured)},
            "source": {**self.source, "n_cells": self.ds.n_cells, "n_genes": self.ds.n_genes},
            "labels": {
                "pert_col": plan.spec.pert_col,
                "control": plan.labels.perturbations[0],
                "controls": list(plan.spec.controls),
                "control_is_missing": plan.spec.control_is_missing,
                "group_by": list(plan.spec.group_by),
                "cell_line": plan.spec.cell_line,
                "cell_line_col": plan.spec.cell_line_col,
                "dropped": plan.labels.dropped,
                "small_groups": [list(x) for x in plan.labels.small],
            },
            "genes": {
                **plan.match.summary(),
                "id_from": plan.genes.id_source,
                "name_from": plan.genes.name_source,
                "ambiguous_genes": {k: list(v) for k, v in plan.match.ambiguous.items()},
            },
            "duplicate_entries": self.duplicates,
            "versions": {"vcelltools": __version__},
            "files": files,
        }
        tmp = self.dpath / "manifest.tmp"
        tmp.write_text(make_manifest(body), encoding="utf-8")
        fsync_path(tmp)
        step("manifest")
        os.replace(tmp, self.dpath / MANIFEST)
        fsync_path(self.dpath)
        step("complete")

    def is_complete(self) -> bool:
        """Say whether the folder holds the whole store of this plan, only not yet at its name."""
        if not (self.dpath / MANIFEST).exists():
            return False
        try:
            return read_manifest(self.dpath)["plan"] == self.fingerprint
        except DataError:
            return False

    def publish(self, target: Path) -> None:
        """Give the finished folder its name."""
        (self.dpath / "journal").unlink(missing_ok=True)
        step("publish")
        replace_folder(self.dpath, target)


class UnitHasher:
    """Hashes units of 16 rows of a stream of rows."""

    def __init__(self) -> None:
        self._rest: np.ndarray | None = None
        self._hashes: list[np.ndarray] = []

    def update(self, rows: np.ndarray) -> None:
        """Take the next rows."""
        if self._rest is not None and len(self._rest):
            rows = np.concatenate([self._rest, rows])
        whole = len(rows) // 16 * 16
        self._hashes.append(hash_units(rows[:whole]))
        self._rest = rows[whole:].copy()

    def finish(self) -> np.ndarray:
        """Return all hashes."""
        if self._rest is not None and len(self._rest):
            self._hashes.append(hash_units(self._rest))
        return np.concatenate(self._hashes) if self._hashes else np.empty(0, np.uint64)


def _take(state: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array from a thread's reused memory."""
    n = int(np.prod(shape))
    have = state.get(name)
    if have is None or len(have) < n:
        state[name] = have = np.empty(n + (n >> 3), dtype)
    return have[:n].reshape(shape)


def _merge_over(parts: list[np.ndarray]) -> np.ndarray:
    """Return the (row, position, count) list sorted, entries of one place added up."""
    if not parts:
        return np.empty((0, 3), np.int64)
    over = np.concatenate(parts)
    over = over[np.lexsort((over[:, 1], over[:, 0]))]
    first = np.ones(len(over), bool)
    first[1:] = (over[1:, :2] != over[:-1, :2]).any(axis=1)
    out = over[first].copy()
    out[:, 2] = np.add.reduceat(over[:, 2], np.flatnonzero(first))
    return out


def write_all(file: Any, data: bytes) -> None:
    """Write every byte to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def pwrite_all(fd: int, rows: np.ndarray, offset: int) -> None:
    """Write a contiguous array at ``offset``."""
    view = memoryview(rows).cast("B")
    while len(view):
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an .npy file and flush it."""
    with open(path, "wb") as f:
        np.save(f, values, allow_pickle=False)
        f.flush()
        os.fsync(f.fileno())
    step(path.name)


def write_parquet(path: Path, frame: Any, *, index: bool) -> None:
    """Write a DataFrame as parquet with page checksums, and flush it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=index)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    fsync_path(path)
