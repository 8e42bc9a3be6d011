"""Pass one over a file that is read gene by gene: CSC, or dense by columns.

Only the basis columns are read, or all columns for sums over all genes. Library sizes must be known
in advance: from saved statistics, from an obs column, or from another pass over everything. Work rows are stored by
gene in ``columns.work``, in store order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io import CscMatrix, DenseMatrix
from vcelltools.io.chunks import CscChunk, DenseChunk
from vcelltools.io.faults import raise_fault_at
from vcelltools.io.matrix import Span
from vcelltools.io.stream import run_spans
from vcelltools.kernels import store as kernels
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.work import Checkpoints, WorkFiles


def scatter_columns(
    layout: Layout, work: WorkFiles, first: int, *, checkpoints: Checkpoints, progress: Progress = SILENT
) -> None:
    """Scatter the genes from column ``first``."""
    libsize = layout.plan.libsize
    if libsize is None and first == 0:
        libsize = add_libsize(layout, progress=progress)
    if libsize is not None:
        work.libsize = libsize
        work.write_libsize(libsize)
    single, shared = get_columns(layout)
    scatter_genes(layout, work, single[single >= first], shared, checkpoints=checkpoints, progress=progress)


def scatter_genes(
    layout: Layout,
    work: WorkFiles,
    single: np.ndarray,
    shared: list[list[int]],
    *,
    checkpoints: Checkpoints,
    progress: Progress = SILENT,
) -> None:
    """Scatter single columns of a gene, and lists of columns that share a gene."""
    order, matrix = layout.plan.order, layout.ds.matrix
    scale = layout.plan.target_sum / np.maximum(work.libsize[order.source], 1)
    group = order.get_groups_of_rows()
    spans = _plan(layout, single)
    more = [[s for c in columns for s in _plan(layout, np.array([c]))] for columns in shared]
    progress.start("genes", sum(s.n_bytes for s in spans) + sum(s.n_bytes for m in more for s in m), "bytes")

    def visit(state: dict[str, Any], chunk: Any, span: Span) -> None:
        if "column" not in state:
            state["column"] = np.empty(layout.n, np.uint32)
        column = state["column"]
        for j, indices, data in _iterate(chunk):
            column[:] = 0
            _fill(layout, j, indices, data, column)
            _store(layout, work, j, column, scale, group)

    batch = max(4 * layout.threads, 16)
    for i in range(0, len(spans), batch):
        some = spans[i : i + batch]
        run_spans(matrix, some, dict, visit, threads=layout.threads, progress=progress)
        checkpoints.offer(some[-1].stop)
    column = np.empty(layout.n, np.uint32)
    for columns, parts in zip(shared, more, strict=True):
        column[:] = 0
        for span in parts:
            for j, indices, data in _iterate(matrix.read(span)):  # type: ignore[arg-type]
                _fill(layout, j, indices, data, column)
            progress.advance(span.n_bytes)
        _store(layout, work, columns[0], column, scale, group)
    progress.finish()


def get_columns(layout: Layout) -> tuple[np.ndarray, list[list[int]]]:
    """Return the required columns that are the only one of their gene, and lists of columns that share a gene."""
    wanted = np.flatnonzero((layout.basis_of_column >= 0) | (layout.measured_of_column >= 0))
    gene = layout.plan.match.merged.of_column
    n_columns = np.bincount(gene)
    single = wanted[n_columns[gene[wanted]] == 1]
    shared: dict[int, list[int]] = {}
    for c in wanted[n_columns[gene[wanted]] > 1].tolist():
        shared.setdefault(int(gene[c]), []).append(c)
    return single, list(shared.values())


def _plan(layout: Layout, columns: np.ndarray) -> list[Span]:
    """Plan the reading of some columns, so that neighbours are read together."""
    matrix, most = layout.ds.matrix, layout.chunk_values
    if not len(columns):
        return []
    cuts = np.flatnonzero(np.diff(columns) != 1) + 1
    if isinstance(matrix, CscMatrix):
        runs = [matrix.plan(max_values=most, start=int(r[0]), stop=int(r[-1]) + 1) for r in np.split(columns, cuts)]
        return [s for r in runs for s in r]
    assert isinstance(matrix, DenseMatrix)
    wanted = np.zeros(matrix.shape[1] + 1, bool)
    wanted[columns] = True
    out = []
    for s in matrix.plan(max_values=most):  # whole storage chunks, but only the required columns within them
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


def _fill(layout: Layout, j: int, indices: np.ndarray, data: np.ndarray, column: np.ndarray) -> None:
    """Add the counts of one column to ``column``, (n,) uint32 in store order."""
    fault, at = kernels.csc_fill_column(indices, data, layout.plan.order.row_of_cell, column)
    if fault:
        raise_fault_at(fault, int(indices[at]), j, data[at], layout.ds)


def _store(layout: Layout, work: WorkFiles, j: int, column: np.ndarray, scale: np.ndarray, group: np.ndarray) -> None:
    """Write the work column of one gene and add its sums."""
    p, m = int(layout.basis_of_column[j]), int(layout.measured_of_column[j])
    if p >= 0:
        if len(column) and int(column.max()) > kernels.MAX_COUNT:
            raise DataError(f"{layout.ds.matrix.where}: gene {j:,} has a count above {kernels.MAX_COUNT:,}")
        big = np.flatnonzero(column >= kernels.WORK_ESCAPE)
        if len(big):
            work.add_over(np.column_stack([big, np.full(len(big), p), column[big]]))
        work.write_column(p, np.minimum(column, kernels.WORK_ESCAPE).astype(np.uint16))
    if m >= 0:
        sums = np.zeros(len(work.sums), np.int64)
        kernels.column_add_sums(column, scale, group, sums)
        work.sums.set_gene(m, sums)


def add_libsize(layout: Layout, columns: range | None = None, *, progress: Progress = SILENT) -> np.ndarray:
    """Return (cells,) int64 library sizes from one pass over all columns (or over some of them)."""
    ds = layout.ds
    if columns is None:
        spans = ds.matrix.plan(max_values=layout.chunk_values)
    else:
        spans = _plan(layout, np.arange(columns.start, columns.stop))
    progress.start("library sizes", sum(s.n_bytes for s in spans), "bytes")

    def visit(total: np.ndarray, chunk: Any, span: Span) -> None:
        for j, indices, data in _iterate(chunk):
            fault, at = kernels.csc_add_libsize(indices, data, total)
            if fault:
                raise_fault_at(fault, int(indices[at]), j, data[at], layout.ds)

    states = run_spans(
        ds.matrix, spans, lambda: np.zeros(ds.n_cells, np.int64), visit, threads=layout.threads, progress=progress
    )
    progress.finish()
    return np.sum(states, axis=0)
