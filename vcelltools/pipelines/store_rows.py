"""Pass one over a file that is read cell by cell: CSR, or dense in rows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.chunks import CsrChunk, DenseChunk
from vcelltools.errors import DataError, NotCountsError
from vcelltools.io import CsrMatrix, DenseMatrix
from vcelltools.kernels import store as kernels
from vcelltools.pipelines.store_files import pwrite_all
from vcelltools.stream import run_spans

if TYPE_CHECKING:
    from vcelltools.pipelines.store_build import Builder

OVER_CAP = 1 << 16
CHUNK_BYTES = 8 << 20  # of work rows that a thread fills at once


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
        raise DataError(f"{where}: more than {OVER_CAP:,} counts of 65,535 and above in one chunk, near {at}")


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


def scatter_rows(b: Builder, start: int, stop: int | None = None) -> None:
    """Scatter the cells ``start:stop`` of the source; checkpoint now and then."""
    matrix = b.ds.matrix
    assert isinstance(matrix, CsrMatrix | DenseMatrix)
    per_cell = (matrix.nnz or matrix.shape[0] * matrix.shape[1]) / matrix.shape[0]
    cells = max(1, CHUNK_BYTES // b.row_bytes)
    most = min(b.chunk_values, int(cells * max(per_cell, 1.0)))  # memory follows cells as well as values
    spans = matrix.plan(max_values=max(1, most), start=start, stop=stop)
    b.progress.start("counts", sum(s.n_bytes for s in spans), "bytes")
    group = max(4 * b.threads, 16)
    said, cost = time.monotonic(), 0.0
    for i in range(0, len(spans), group):
        some = spans[i : i + group]
        run_spans(
            matrix,
            some,
            dict,
            lambda state, chunk, span: visit(b, state, to_rows(chunk)),  # type: ignore[arg-type]
            threads=b.threads,
            progress=b.progress,
        )
        b.trim_sums()
        if i + group < len(spans) and time.monotonic() - said > max(b.checkpoint_seconds, 20 * cost):
            began = time.monotonic()
            b.checkpoint("rows", rows=some[-1].stop)
            said = time.monotonic()
            cost = said - began
    b.progress.finish()


def visit(b: Builder, state: dict[str, Any], chunk: CsrChunk) -> None:
    """Scatter one chunk of cells."""
    n_rows = chunk.n_rows
    cells = slice(chunk.start, chunk.start + n_rows)
    slots = b.slot_of_cell[cells]
    kept = np.flatnonzero(slots >= 0)
    by_slot = kept[np.argsort(slots[kept])]
    out_row = np.full(n_rows, -1, np.int64)
    out_row[by_slot] = np.arange(len(by_slot))
    work = _take(state, "work", (len(by_slot), b.stride), np.uint16)
    over = _take(state, "over", (OVER_CAP, 3), np.int64)
    libsize = np.zeros(n_rows, np.int64)
    status = np.zeros(5, np.int64)
    kernels.csr_fill_work(
        chunk.indptr, chunk.indices, chunk.data, b.basis_of_column, out_row, libsize, work, over, status
    )
    if status[0]:
        j = int(status[2])
        value = chunk.indices[j] if status[0] == kernels.BAD_INDEX else chunk.data[j]
        cell = chunk.start + int(status[1])
        raise_status(status, value, int(chunk.indices[j]), where=b.ds.matrix.where, cell=cell)
    if b.known_libsize is not None:
        short = np.flatnonzero(b.known_libsize[cells] < libsize)
        if len(short):
            i = chunk.start + int(short[0])
            raise DataError(
                f"{b.ds.label}: cell {i:,} holds {int(libsize[short[0]]):,} counts, but its library size by "
                f"obs/{b.plan.spec.library_size} is {int(b.known_libsize[i]):,}",
                hint="library_size names the column of total counts",
            )
        libsize = b.known_libsize[cells]
    pwrite_all(b.lib_fd, np.ascontiguousarray(libsize), 8 * chunk.start)
    _write_work(b, work, slots[by_slot])
    if status[3]:
        found = over[: int(status[3])].copy()
        found[:, 0] = b.plan.order.row_of_cell[cells][by_slot][found[:, 0]]
        with b.lock:
            b.over.append(found)
    _add_sums(b, state, chunk, libsize, cells, unsorted=bool(status[4]))


def _write_work(b: Builder, work: np.ndarray, slots: np.ndarray) -> None:
    """Write work rows to their places; neighbours go in one write."""
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    first = np.append(0, cuts)
    last = np.append(cuts, len(slots))
    for a, z in zip(first.tolist(), last.tolist(), strict=True):
        if z > a:
            pwrite_all(b.x_fd, work[a:z], int(slots[a]) * b.row_bytes)


def _add_sums(b: Builder, state: dict[str, Any], chunk: CsrChunk, libsize, cells: slice, *, unsorted: bool) -> None:
    group = b.plan.order.get_groups(cells.start, cells.stop)
    indptr, indices, data, measured = chunk.indptr, chunk.indices, chunk.data, b.measured_of_column
    if unsorted or not b.measured_is_plain:
        indptr, indices, data = _canonicalise(b, chunk)
        measured = np.arange(len(b.measured), dtype=np.int32)
    scale = b.plan.target_sum / np.maximum(libsize, 1)
    fixed = _take(state, "fixed", (len(data),), np.int32)
    kernels.csr_fixed_logs(indptr, data, scale, fixed)
    step, n_parts = b.rows_at_once, len(b.sum_locks)
    turn = next(b.turns)
    for k in range(n_parts):
        part = (turn + k) % n_parts
        with b.sum_locks[part]:
            for a in range(0, chunk.n_rows, step):
                bounds, groups = indptr[a : a + step + 1], group[a : a + step]
                kernels.csr_add_sums(bounds, indices, fixed, groups, measured, part, n_parts, b.sums)
                if step < chunk.n_rows:
                    b.trim_sums()


def _canonicalise(b: Builder, chunk: CsrChunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map columns to measured genes and add up what falls together in one cell."""
    from scipy import sparse

    shape = (chunk.n_rows, chunk.n_genes)
    m = sparse.csr_matrix((chunk.data.astype(np.int64), chunk.indices.astype(np.int64), chunk.indptr), shape=shape)
    m.sum_duplicates()
    with b.lock:
        b.duplicates += len(chunk.data) - m.nnz
    mapped = b.measured_of_column[m.indices]
    keep = mapped >= 0
    indptr = np.append(0, np.cumsum(keep))[m.indptr]
    m = sparse.csr_matrix((m.data[keep], mapped[keep], indptr), shape=(chunk.n_rows, len(b.measured)))
    m.sum_duplicates()
    if m.nnz and m.data.max() > kernels.MAX_COUNT:
        cell = chunk.start + int(np.searchsorted(m.indptr, m.data.argmax(), side="right")) - 1
        raise DataError(
            f"{b.ds.matrix.where}: entries of cell {cell:,} and one gene add up to {int(m.data.max()):,}, above the "
            f"largest count, {kernels.MAX_COUNT:,}"
        )
    return m.indptr.astype(np.int64), m.indices.astype(np.int32), m.data


def _take(state: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array from a thread's reused memory."""
    n = int(np.prod(shape))
    have = state.get(name)
    if have is None or len(have) < n:
        state[name] = have = np.empty(n + (n >> 3), dtype)
    return have[:n].reshape(shape)
