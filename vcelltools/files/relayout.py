"""Stream a matrix to another file, between any layouts, optionally selecting rows and changing values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.chunks import Chunk, CscChunk, CsrChunk, DenseChunk, compress_rows
from vcelltools.io.matrix import Buffers, CscMatrix, CsrMatrix, DenseMatrix, Matrix, Span
from vcelltools.io.stream import map_spans
from vcelltools.io.write.h5ad import MatrixWriter
from vcelltools.io.write.transpose import ColumnSpill
from vcelltools.runtime.progress import SILENT, Progress

# A function that returns a new chunk with the same rows and columns, which owns its arrays.
Change: TypeAlias = Callable[[Chunk], Chunk]
Triple: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
_DENSE_VALUES = 4 << 20
_GAP = 256  # largest gap between requested rows that is cheaper to read than to skip


def copy_chunk(chunk: Chunk) -> Chunk:
    """Return the chunk with arrays of its own."""
    return chunk.copy()


def rewrite_matrix(
    matrix: Matrix,
    out: MatrixWriter,
    *,
    change: Change = copy_chunk,
    rows: np.ndarray | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> int:
    """Stream ``matrix`` to ``out``; return the number of stored values (cells × genes for dense outputs).

    Parameters
    ----------
    change
        Called in worker threads on every chunk, before rows are selected.
    rows
        (m,) strictly increasing positions of the rows to keep; by default all.

    Raises
    ------
    DataError
        If an index is outside the matrix; errors of ``change`` are raised too.
    """
    if isinstance(matrix, CscMatrix):
        _rewrite_columns(matrix, out, change, rows, threads, progress)
    else:
        _rewrite_rows(matrix, out, change, rows, threads, progress)
    return out.nnz if out.layout != "dense" else out.n_rows * out.part.n_genes


def _get_folder(out: MatrixWriter) -> Path:
    return out.part.owner.path.parent


def _rewrite_rows(
    matrix: CsrMatrix | DenseMatrix,
    out: MatrixWriter,
    change: Change,
    rows: np.ndarray | None,
    threads: int | None,
    progress: Progress,
) -> None:
    blocks = _iter_rows(matrix, change, rows, threads, progress)
    if out.layout != "csc":
        for block in blocks:
            if isinstance(block, tuple):
                out.append_csr(*block)
            else:
                out.append_dense(block)
        return
    nnz = matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1] // 4
    with ColumnSpill(_get_folder(out), n_minor=matrix.shape[1], nnz=nnz) as spill:
        for block in blocks:
            spill.append(*(block if isinstance(block, tuple) else compress_rows(block)))
        for triple in spill.blocks():
            out.append_csc(*triple)


def _rewrite_columns(
    matrix: CscMatrix,
    out: MatrixWriter,
    change: Change,
    rows: np.ndarray | None,
    threads: int | None,
    progress: Progress,
) -> None:
    place = None
    if rows is not None:
        place = np.full(matrix.shape[0], -1, np.int64)
        place[rows] = np.arange(len(rows))

    def make(chunk: object, span: Span) -> Triple:
        assert isinstance(chunk, CscChunk)
        _check_indices(chunk, f"{matrix.where}: columns {span.start:,} to {span.stop:,}")
        new = change(chunk)
        assert isinstance(new, CscChunk)
        if place is None:
            return new.indptr, new.indices, new.data
        at = place[new.indices]
        inside = at >= 0
        ends = np.concatenate([[0], np.cumsum(inside)])
        return ends[new.indptr], at[inside], new.data[inside]

    blocks = map_spans(matrix, matrix.plan(), make, threads=threads, progress=progress)
    if out.layout == "csc":
        for triple in blocks:
            out.append_csc(*triple)
        return
    n = matrix.shape[0] if rows is None else len(rows)
    with ColumnSpill(_get_folder(out), n_minor=n, nnz=matrix.nnz) as spill:  # the transposed columns are rows
        for triple in blocks:
            spill.append(*triple)
        for indptr, indices, data in spill.blocks():
            if out.layout == "csr":
                out.append_csr(indptr, indices, data)
                continue
            step = max(1, _DENSE_VALUES // matrix.shape[1])
            for a in range(0, len(indptr) - 1, step):
                part = indptr[a : a + step + 1]
                out.append_csr(part - part[0], indices[part[0] : part[-1]], data[part[0] : part[-1]])


def _iter_rows(
    matrix: CsrMatrix | DenseMatrix,
    change: Change,
    rows: np.ndarray | None,
    threads: int | None,
    progress: Progress,
) -> Iterator[Triple | np.ndarray]:
    """Yield row blocks in order, as CSR triples or dense blocks."""
    if isinstance(matrix, DenseMatrix) and matrix.axis == 1:
        yield from _iter_tall(matrix, change, rows, progress)
        return

    def make(chunk: object, span: Span) -> Triple | np.ndarray:
        if isinstance(chunk, CsrChunk):
            _check_indices(chunk, f"{matrix.where}: rows {span.start:,} to {span.stop:,}")
        new = change(chunk)  # type: ignore[arg-type]
        wanted = None if rows is None else _pick(rows, span.start, span.stop)
        if isinstance(new, DenseChunk):
            return new.block if wanted is None else new.block[wanted]
        assert isinstance(new, CsrChunk)
        return _pick_csr(new, wanted)

    yield from map_spans(matrix, _plan_rows(matrix, rows), make, threads=threads, progress=progress)


def _iter_tall(
    matrix: DenseMatrix, change: Change, rows: np.ndarray | None, progress: Progress
) -> Iterator[np.ndarray]:
    """Row bands of a dense matrix that is chunked by columns."""
    n, g = matrix.shape
    step = max(1, 4 * _DENSE_VALUES // g)
    buffers = Buffers()
    for a in range(0, n, step):
        b = min(a + step, n)
        wanted = None if rows is None else _pick(rows, a, b)
        if wanted is None or len(wanted):
            new = change(matrix.read_block(a, b, 0, g, buffers))
            assert isinstance(new, DenseChunk)
            block = new.block
            yield block if wanted is None else block[wanted]
        progress.advance(matrix.stored_bytes * (b - a) / n)


def _plan_rows(matrix: CsrMatrix | DenseMatrix, rows: np.ndarray | None) -> list[Span]:
    """Plan the spans that hold the requested rows."""
    if isinstance(matrix, DenseMatrix):
        spans = matrix.plan(max_values=_DENSE_VALUES)
        return spans if rows is None else [s for s in spans if len(_pick(rows, s.start, s.stop))]
    if rows is None:
        return matrix.plan()
    spans = []
    if len(rows):
        cuts = np.flatnonzero(np.diff(rows) > _GAP) + 1
        for run in np.split(rows, cuts):
            spans += matrix.plan(start=int(run[0]), stop=int(run[-1]) + 1)
    return spans


def _pick(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    a, b = np.searchsorted(rows, [start, stop])
    return rows[a:b] - start


def _pick_csr(chunk: CsrChunk, wanted: np.ndarray | None) -> Triple:
    if wanted is None:
        return chunk.indptr, chunk.indices, chunk.data
    length = np.diff(chunk.indptr)[wanted]
    indptr = np.concatenate([[0], np.cumsum(length)])
    at = np.repeat(chunk.indptr[wanted] - indptr[:-1], length) + np.arange(indptr[-1])
    return indptr, chunk.indices[at], chunk.data[at]


def _check_indices(chunk: CsrChunk | CscChunk, where: str) -> None:
    if (j := chunk.find_outside()) is not None:
        raise DataError(f"{where}: the index {chunk.indices[j]:,} at value {j:,} is outside 0 … {chunk.n_minor - 1:,}")
