"""Pass one over a file that is read gene by gene: CSC, or dense in columns.

Only the basis columns are read (all of them where sums over all genes are wanted). Library sizes must be known
before: from saved statistics, from an obs column, or from one more pass over everything. Work rows lie gene by gene
in ``columns.work``, in store order.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.chunks import CscChunk, DenseChunk
from vcelltools.errors import DataError
from vcelltools.io import CscMatrix, DenseMatrix
from vcelltools.io.matrix import Span
from vcelltools.kernels import store as kernels
from vcelltools.pipelines.store_files import pwrite_all
from vcelltools.pipelines.store_rows import raise_status
from vcelltools.stream import run_spans

if TYPE_CHECKING:
    from vcelltools.pipelines.store_build import Builder


def scatter_columns(b: Builder, first: int) -> None:
    """Scatter the genes from column ``first`` on; checkpoint now and then."""
    if b.known_libsize is None and first == 0:
        b.known_libsize = add_libsize(b)
    if b.known_libsize is not None:
        b.libsize = b.known_libsize
        pwrite_all(b.lib_fd, b.libsize, 0)
    single, shared = get_columns(b)
    scatter_genes(b, single[single >= first], shared)


def scatter_genes(b: Builder, single: np.ndarray, shared: list[list[int]], *, checkpoints: bool = True) -> None:
    """Scatter columns that are a gene of their own, and lists of columns that share one."""
    scale = b.plan.target_sum / np.maximum(b.libsize[b.plan.order.source], 1)
    group = b.plan.order.get_groups_of_rows()
    spans = _plan(b, single)
    more = [[s for c in columns for s in _plan(b, np.array([c]))] for columns in shared]
    b.progress.start("genes", sum(s.n_bytes for s in spans) + sum(s.n_bytes for m in more for s in m), "bytes")
    batch = max(4 * b.threads, 16)
    said, cost = time.monotonic(), 0.0

    def visit(state: dict[str, Any], chunk: Any, span: Span) -> None:
        for j, indices, data in _iterate(chunk):
            column = _take_column(b, state)
            _fill(b, j, indices, data, column)
            _store(b, j, column, scale, group)

    for i in range(0, len(spans), batch):
        some = spans[i : i + batch]
        run_spans(b.ds.matrix, some, dict, visit, threads=b.threads, progress=b.progress)
        if checkpoints and time.monotonic() - said > max(b.checkpoint_seconds, 20 * cost):
            began = time.monotonic()
            b.checkpoint("rows", rows=some[-1].stop)
            said = time.monotonic()
            cost = said - began
    column = np.empty(b.n, np.uint32)
    for columns, parts in zip(shared, more, strict=True):
        column[:] = 0
        for span in parts:
            for j, indices, data in _iterate(b.ds.matrix.read(span)):  # type: ignore[arg-type]
                _fill(b, j, indices, data, column)
            b.progress.advance(span.n_bytes)
        _store(b, columns[0], column, scale, group)
    b.progress.finish()


def get_columns(b: Builder) -> tuple[np.ndarray, list[list[int]]]:
    """Return the wanted columns that are a gene of their own, and lists of columns that share one."""
    wanted = np.flatnonzero((b.basis_of_column >= 0) | (b.measured_of_column >= 0))
    gene = b.plan.match.merged.of_column
    n_columns = np.bincount(gene)
    single = wanted[n_columns[gene[wanted]] == 1]
    shared: dict[int, list[int]] = {}
    for c in wanted[n_columns[gene[wanted]] > 1].tolist():
        shared.setdefault(int(gene[c]), []).append(c)
    return single, list(shared.values())


def _plan(b: Builder, columns: np.ndarray) -> list[Span]:
    """Plan the reading of some columns: neighbours are read together."""
    matrix = b.ds.matrix
    if not len(columns):
        return []
    cuts = np.flatnonzero(np.diff(columns) != 1) + 1
    if isinstance(matrix, CscMatrix):
        runs = [
            matrix.plan(max_values=b.chunk_values, start=int(r[0]), stop=int(r[-1]) + 1)
            for r in np.split(columns, cuts)
        ]
        return [s for r in runs for s in r]
    assert isinstance(matrix, DenseMatrix)
    wanted = np.zeros(matrix.shape[1] + 1, bool)
    wanted[columns] = True
    out = []
    for s in matrix.plan(max_values=b.chunk_values):  # whole storage chunks; within them only what is wanted
        edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted[s.start : s.stop], [False]]))) + s.start
        share = s.n_bytes // (s.stop - s.start)
        out += [
            Span(int(i), int(j), int(j - i) * matrix.shape[0], int(j - i) * share)
            for i, j in zip(edges[::2], edges[1::2], strict=True)
        ]
    return out


def _iterate(chunk: CscChunk | DenseChunk):
    """Yield (column, cells, values) of each column of a chunk."""
    if isinstance(chunk, CscChunk):
        for k in range(chunk.n_cols):
            a, z = int(chunk.indptr[k]), int(chunk.indptr[k + 1])
            yield chunk.start + k, chunk.indices[a:z], chunk.data[a:z]
        return
    for k in range(chunk.block.shape[1]):
        values = chunk.block[:, k]
        cells = np.flatnonzero(values)
        yield chunk.col_start + k, cells.astype(np.int32), np.ascontiguousarray(values[cells])


def _take_column(b: Builder, state: dict[str, Any]) -> np.ndarray:
    if "column" not in state:
        state["column"] = np.empty(b.n, np.uint32)
    state["column"][:] = 0
    return state["column"]


def _fill(b: Builder, j: int, indices: np.ndarray, data: np.ndarray, column: np.ndarray) -> None:
    """Add one column's counts to ``column`` (n,) uint32 in store order."""
    status = np.zeros(5, np.int64)
    kernels.csc_fill_column(indices, data, b.plan.order.row_of_cell, column, status)
    _raise(b, status, j, indices, data)


def _raise(b: Builder, status: np.ndarray, j: int, indices: np.ndarray, data: np.ndarray) -> None:
    if status[0]:
        at = int(status[2])
        value = indices[at] if status[0] == kernels.BAD_INDEX else data[at]
        raise_status(status, value, j, where=b.ds.matrix.where, cell=int(indices[at]))


def _store(b: Builder, j: int, column: np.ndarray, scale: np.ndarray, group: np.ndarray) -> None:
    """Write one gene's work column and add its sums."""
    p, m = int(b.basis_of_column[j]), int(b.measured_of_column[j])
    if p >= 0:
        if len(column) and int(column.max()) > kernels.MAX_COUNT:
            raise DataError(f"{b.ds.matrix.where}: gene {j:,} has a count above {kernels.MAX_COUNT:,}")
        big = np.flatnonzero(column >= kernels.WORK_ESCAPE)
        if len(big):
            with b.lock:
                b.over.append(np.column_stack([big, np.full(len(big), p), column[big]]))
        pwrite_all(b.columns_fd, np.minimum(column, kernels.WORK_ESCAPE).astype(np.uint16), p * b.n * 2)
    if m >= 0:
        sums = np.zeros(len(b.sums), np.int64)
        kernels.column_add_sums(column, scale, group, sums)
        step = b.rows_at_once
        for a in range(0, len(sums), step):
            b.sums[a : a + step, m] = sums[a : a + step]
            if step < len(sums):
                b.trim_sums()


def add_libsize(b: Builder, columns: range | None = None) -> np.ndarray:
    """Return (cells,) int64 library sizes from one pass over all columns (or the share of some of them)."""
    matrix = b.ds.matrix
    if columns is None:
        spans = matrix.plan(max_values=b.chunk_values)
    else:
        spans = _plan(b, np.arange(columns.start, columns.stop))
    b.progress.start("library sizes", sum(s.n_bytes for s in spans), "bytes")

    def visit(total: np.ndarray, chunk: Any, span: Span) -> None:
        for j, indices, data in _iterate(chunk):
            status = np.zeros(5, np.int64)
            kernels.csc_add_libsize(indices, data, total, status)
            _raise(b, status, j, indices, data)

    states = run_spans(
        matrix,
        spans,
        lambda: np.zeros(b.ds.n_cells, np.int64),
        visit,
        threads=b.threads,
        progress=b.progress,
    )
    b.progress.finish()
    return np.sum(states, axis=0)
