"""Read some genes of a matrix, at about the cost of those genes if the layout allows it.

:func:`select_columns` returns a matrix with the same interface (``plan`` and ``read``) and only those columns:

- CSC: only the bytes of these columns are read;
- dense, chunked: only the chunks that hold a wanted column;
- dense and contiguous, or CSR: everything is read, and the other columns are dropped.
"""

from __future__ import annotations

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.io.matrix import DEFAULT_MAX_VALUES, Buffers, CscMatrix, CsrMatrix, DenseMatrix, Matrix, Span, cut_dense

_MAX_BLOCK_BYTES = 4 << 30


def select_columns(matrix: Matrix, columns: np.ndarray) -> Matrix:
    """Return ``matrix`` with only the given columns, in the given order.

    Parameters
    ----------
    columns
        (k,) positions, each once.

    Raises
    ------
    DataError
        If a position is repeated or is not a column of the matrix.
    """
    columns = np.asarray(columns, np.int64)
    if len(np.unique(columns)) != len(columns):
        raise DataError(f"{matrix.where}: a column is selected twice")
    if len(columns) == 0 or int(columns.min()) < 0 or int(columns.max()) >= matrix.shape[1]:
        raise DataError(f"{matrix.where}: a selected column is not among the {matrix.shape[1]:,} columns")
    if isinstance(matrix, CsrMatrix):
        return SelectedCsrMatrix(matrix, columns)
    if isinstance(matrix, CscMatrix):
        return SelectedCscMatrix(matrix, columns)
    return SelectedDenseMatrix(matrix, columns)


def read_columns(matrix: Matrix, columns: np.ndarray, *, max_bytes: int = _MAX_BLOCK_BYTES) -> np.ndarray:
    """Return a few columns of all cells as a C-contiguous (n, k) array in the ``chunk_dtype`` of the matrix.

    Duplicate entries are summed.

    Raises
    ------
    DataError
        If the result would take more than ``max_bytes``, or an index in the file is out of range.
    """
    chosen = select_columns(matrix, columns)
    n, k = chosen.shape
    if n * k * chosen.chunk_dtype.itemsize > max_bytes:
        raise DataError(
            f"{matrix.where}: {k:,} columns of {n:,} cells would take more than {max_bytes:,} bytes of memory"
        )
    out_nk = np.zeros((n, k), chosen.chunk_dtype)
    buffers = Buffers()
    for span in chosen.plan():
        c = chosen.read(span, buffers)
        if isinstance(c, DenseChunk):
            out_nk[c.cells, c.genes] = c.block
            continue
        _check_range(c.indices, c.n_minor, chosen.where, 0)
        cells, genes, values = c.get_entries()
        np.add.at(out_nk, (cells, genes), values)
    return out_nk


def _check_range(indices: np.ndarray, n: int, where: str, offset: int) -> None:
    if len(indices) and (int(indices.max()) >= n or int(indices.min()) < 0):
        at = int(np.flatnonzero((indices >= n) | (indices < 0))[0])
        raise DataError(
            f"{where}/indices holds {int(indices[at])} at position {offset + at:,}, but there are only {n:,}"
        )


class SelectedCsrMatrix(CsrMatrix):
    """Some columns of a CSR matrix; ``nnz`` and ``indptr`` describe the stored matrix."""

    def __init__(self, whole: CsrMatrix, columns: np.ndarray) -> None:
        self.__dict__.update(whole.__dict__)
        self._n_stored = whole.shape[1]
        self.shape = (whole.shape[0], len(columns))
        self._position = np.full(self._n_stored, -1, self._chunk_index)
        self._position[columns] = np.arange(len(columns))

    def read(self, span: Span, buffers: Buffers | None = None) -> CsrChunk:
        """Return the rows of ``span``, with only the selected columns."""
        indptr, indices, data = self._read(span, buffers)
        _check_range(indices, self._n_stored, self.where, int(self.indptr[span.start]))
        position = self._position[indices]
        keep = position >= 0
        ends = np.concatenate([[0], np.cumsum(keep)])[indptr]
        return CsrChunk(start=span.start, indptr=ends, indices=position[keep], data=data[keep], n_genes=self.shape[1])


class SelectedCscMatrix(CscMatrix):
    """Some columns of a CSC matrix; ``nnz`` and ``indptr`` describe the selection."""

    def __init__(self, whole: CscMatrix, columns: np.ndarray) -> None:
        self.__dict__.update(whole.__dict__)
        self.shape = (whole.shape[0], len(columns))
        self._starts, self._ends = whole.indptr[columns], whole.indptr[columns + 1]
        self.indptr = np.concatenate([[0], np.cumsum(self._ends - self._starts)])
        self.stored_bytes = int(whole.stored_bytes * (int(self.indptr[-1]) / max(whole.nnz, 1)))
        self.nnz = int(self.indptr[-1])

    def _get_runs(self, span: Span) -> list[tuple[int, int]]:
        """Return the stored ranges of the columns of a span, with adjacent ranges joined."""
        starts, ends = self._starts[span.start : span.stop], self._ends[span.start : span.stop]
        cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        first = np.concatenate([[0], cuts])
        last = np.concatenate([cuts, [len(starts)]]) - 1
        return list(zip(starts[first].tolist(), ends[last].tolist(), strict=True))

    def read_values(self, start: int, stop: int) -> np.ndarray:
        """Return the values ``start:stop`` of the selection, without their positions."""
        first = int(np.searchsorted(self.indptr, start, side="right")) - 1
        last = int(np.searchsorted(self.indptr, stop, side="left"))
        values = self._data.read_runs(self._get_runs(Span(first, last, 0, 0)), self.chunk_dtype, None)
        return values[start - int(self.indptr[first]) : stop - int(self.indptr[first])]

    def read(self, span: Span, buffers: Buffers | None = None) -> CscChunk:
        """Return the columns of ``span``, numbered within the selection."""
        buffers = buffers or Buffers()
        runs = self._get_runs(span)
        indices = self._indices.read_runs(runs, self._chunk_index, buffers.indices)
        data = self._data.read_runs(runs, self.chunk_dtype, buffers.data)
        indptr = self.indptr[span.start : span.stop + 1] - self.indptr[span.start]
        return CscChunk(start=span.start, indptr=indptr, indices=indices, data=data, n_cells=self.shape[0])


class SelectedDenseMatrix(DenseMatrix):
    """Some columns of a dense matrix: rows are read if it is stored by rows, otherwise only the chunks needed."""

    def __init__(self, whole: DenseMatrix, columns: np.ndarray) -> None:
        self.__dict__.update(whole.__dict__)
        self._columns = columns
        self.shape = (whole.shape[0], len(columns))
        self._n_stored = whole.shape[1]
        self.stored_bytes = int(whole.stored_bytes * self._get_share())

    def _get_share(self) -> float:
        """Return the fraction of the stored bytes that has to be read."""
        chunks = self._values.chunks
        if chunks is None:
            return 1.0
        width = chunks[1]
        return min(1.0, len(np.unique(self._columns // width)) * width / self._n_stored)

    def plan(self, *, max_values: int = DEFAULT_MAX_VALUES, start: int = 0, stop: int | None = None) -> list[Span]:
        """Divide the axis of the spans into blocks of about ``max_values`` values, counted before the selection."""
        if self.axis == 0:
            chunks = self._values.chunks
            unit = chunks[0] if chunks else 1
            width = max(int(self._n_stored * self._get_share()), self.shape[1])
            step = max(1, max_values // max(width * unit, 1)) * unit
        else:
            step = max(1, max_values // self.shape[0])
        n, other = self.shape[self.axis], self.shape[1 - self.axis]
        stop = n if stop is None else stop
        item = self.stored_bytes / max(self.shape[0] * self.shape[1], 1)
        return cut_dense(start, stop, step, other, item)

    def read(self, span: Span, buffers: Buffers | None = None) -> DenseChunk:
        """Return the block of ``span``; genes are numbered within the selection."""
        if self.axis == 0:
            return self.read_block(span.start, span.stop, 0, self.shape[1], buffers)
        return self.read_block(0, self.shape[0], span.start, span.stop, buffers)

    def read_block(self, r0: int, r1: int, c0: int, c1: int, buffers: Buffers | None = None) -> DenseChunk:
        """Return the cells ``r0:r1`` of the selection's columns ``c0:c1``."""
        buffers = buffers or Buffers()
        wanted = self._columns[c0:c1]
        out_bw = buffers.data.take((r1 - r0) * len(wanted), self.chunk_dtype).reshape(r1 - r0, len(wanted))
        width = self._values.chunks[1] if self._values.chunks else self._n_stored
        for k in np.unique(wanted // width).tolist():
            here = np.flatnonzero(wanted // width == k)
            at = int(wanted[here].min()), int(wanted[here].max()) + 1
            block = self._values.read(r0, r1, at[0], at[1], self.chunk_dtype, buffers.indices)
            out_bw[:, here] = block[:, wanted[here] - at[0]]
        return DenseChunk(row_start=r0, col_start=c0, block=out_bw)
