"""Cells × genes matrices of any layout, divided into spans that any thread can read.

A span is the part that one :meth:`read` returns: some rows of a CSR matrix, some columns of a CSC matrix, or a block of
a dense one. Spans tile the matrix and depend only on the file and on ``max_values``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from vcelltools.errors import DataError, NotCountsError
from vcelltools.io.chunks import CscChunk, CsrChunk, DenseChunk, get_chunk_dtype
from vcelltools.io.hdf5.arrays import Array1D, Array2D, Buffer

DEFAULT_MAX_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Rows (CSR, dense) or columns (CSC, dense) to read at once; columns of a dense matrix cover cells ``r0:r1``."""

    start: int
    stop: int
    n_values: int
    n_bytes: int
    r0: int = 0
    r1: int = 0


def _get_values_dtype(dtype: np.dtype, where: str) -> np.dtype:
    """Return the chunk dtype of values stored as ``dtype``, or raise if they are not numbers."""
    if dtype.kind == "b":
        raise NotCountsError(f"{where} holds boolean values, not counts", hint="pass the layer with the counts")
    try:
        return get_chunk_dtype(dtype)
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{where} has dtype {dtype}, not real numbers") from e


class Buffers:
    """The reusable buffers of one thread."""

    def __init__(self) -> None:
        self.indices = Buffer()
        self.data = Buffer()


def check_indptr(indptr: np.ndarray, *, n_major: int, nnz: int, where: str) -> np.ndarray:
    """Return ``indptr`` as int64, after checking that it starts at 0, never decreases and ends at ``nnz``.

    Raises
    ------
    DataError
        If it does not; the message names the first wrong position.
    """
    if indptr.ndim != 1 or indptr.dtype.kind not in "iu":
        raise DataError(f"{where}/indptr is not a list of integers ({indptr.dtype}, {indptr.ndim} dimensions)")
    if len(indptr) != n_major + 1:
        raise DataError(f"{where}/indptr has {len(indptr):,} entries, but the shape requires {n_major + 1:,}")
    if indptr.dtype.kind == "u" and int(indptr.max()) > nnz:
        i = int(np.flatnonzero(indptr > nnz)[0])
        raise DataError(f"{where}/indptr holds {int(indptr[i]):,} at position {i:,}, but {nnz:,} values are stored")
    out = indptr.astype(np.int64, copy=False)
    if out[0] != 0:
        raise DataError(f"{where}/indptr starts at {out[0]:,}, not at 0")
    falls = np.flatnonzero(out[1:] < out[:-1])
    if len(falls):
        i = int(falls[0])
        raise DataError(f"{where}/indptr decreases from {out[i]:,} to {out[i + 1]:,} at position {i + 1:,}")
    if out[-1] != nnz:
        raise DataError(f"{where}/indptr ends at {out[-1]:,} but {nnz:,} values are stored")
    return out


class _Shaped:
    """Cells × genes; ``cold`` says whether reads wait for the disk."""

    shape: tuple[int, int]
    cold = False

    @property
    def n_cells(self) -> int:
        """Number of rows of the matrix."""
        return self.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of columns of the matrix."""
        return self.shape[1]


class _Sparse(_Shaped):
    """The common base of CSR and CSC: a major axis with an indptr, ``indices`` and ``data``."""

    layout = ""
    by_gene = False  # whether spans are columns

    def __init__(
        self,
        *,
        shape: tuple[int, int],
        n_major: int,
        indptr: np.ndarray,
        indices: Array1D,
        data: Array1D,
        where: str,
    ) -> None:
        self.shape = shape
        self.where = where
        if indices.length != data.length:
            raise DataError(
                f"{where}: data holds {data.length:,} values but indices holds {indices.length:,}; one is damaged"
            )
        if indices.dtype.kind not in "iu":
            raise DataError(f"{where}/indices is {indices.dtype}, not integers")
        self.nnz = data.length
        self.indptr = check_indptr(indptr, n_major=n_major, nnz=self.nnz, where=where)
        self._indices, self._data = indices, data
        self.dtype = data.dtype
        self.index_dtype = indices.dtype
        self.chunk_dtype = _get_values_dtype(data.dtype, f"{where}/data")
        self._chunk_index = np.dtype(
            "int32" if indices.dtype.itemsize < 4 or indices.dtype.newbyteorder("=") == "int32" else "int64"
        )
        self.stored_bytes = indices.stored_bytes + data.stored_bytes
        self.filters = data.filters
        self.cold = data.cold

    def plan(self, *, max_values: int = DEFAULT_MAX_VALUES, start: int = 0, stop: int | None = None) -> list[Span]:
        """Divide ``start:stop`` of the major axis into spans of at most ``max_values`` values (or one row)."""
        stop = len(self.indptr) - 1 if stop is None else stop
        # a span shorter than a compressed chunk would wait for the chunk of its neighbours
        if self.filters and self._data.chunk_len:
            max_values = max(max_values, min(self._data.chunk_len, 1 << 24))
        per_value = self.stored_bytes / max(self.nnz, 1)
        spans, a = [], start
        max_major = max(1, max_values)  # empty rows have a cost too
        while a < stop:
            b = int(np.searchsorted(self.indptr, self.indptr[a] + max_values, side="right")) - 1
            b = min(max(b, a + 1), stop, a + max_major)
            n = int(self.indptr[b] - self.indptr[a])
            spans.append(Span(a, b, n, int(n * per_value)))
            a = b
        return spans

    def read_values(self, start: int, stop: int) -> np.ndarray:
        """Return the stored values ``start:stop``, without their positions, in a new array."""
        return self._data.read(start, stop, self.chunk_dtype, None)

    def map_values(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (indices, data) as memory maps if the file holds both uncompressed and contiguous, otherwise None."""
        indices, data = self._indices.map(), self._data.map()
        return None if indices is None or data is None else (indices, data)

    def _read(self, span: Span, buffers: Buffers | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        buffers = buffers or Buffers()
        a, b = int(self.indptr[span.start]), int(self.indptr[span.stop])
        indptr = self.indptr[span.start : span.stop + 1] - a
        indices = self._indices.read(a, b, self._chunk_index, buffers.indices)
        data = self._data.read(a, b, self.chunk_dtype, buffers.data)
        return indptr, indices, data

    def forget(self) -> None:
        """Free ``indptr``, which takes 8 bytes per row or column, after the last read."""
        self.indptr = np.zeros(1, np.int64)


class CsrMatrix(_Sparse):
    """A CSR matrix: spans are rows."""

    layout = "csr"
    by_gene = False

    def read(self, span: Span, buffers: Buffers | None = None) -> CsrChunk:
        """Return the rows of ``span``."""
        indptr, indices, data = self._read(span, buffers)
        return CsrChunk(start=span.start, indptr=indptr, indices=indices, data=data, n_genes=self.shape[1])


class CscMatrix(_Sparse):
    """A CSC matrix: spans are columns."""

    layout = "csc"
    by_gene = True

    def read(self, span: Span, buffers: Buffers | None = None) -> CscChunk:
        """Return the columns of ``span``."""
        indptr, indices, data = self._read(span, buffers)
        return CscChunk(start=span.start, indptr=indptr, indices=indices, data=data, n_cells=self.shape[0])


def cut_dense(start: int, stop: int, step: int, width: int, item: float) -> list[Span]:
    """Divide ``start:stop`` at the multiples of ``step``; a row has ``width`` values of ``item`` stored bytes each."""
    spans, a = [], start
    while a < stop:
        b = min((a // step + 1) * step, stop)
        spans.append(Span(a, b, (b - a) * width, int((b - a) * width * item)))
        a = b
    return spans


class DenseMatrix(_Shaped):
    """A dense matrix: spans are blocks of whole rows, or of whole columns if it is chunked by columns.

    Attributes
    ----------
    axis
        0 if spans are rows (``start:stop`` are cells), 1 if they are columns.
    """

    layout = "dense"

    def __init__(self, values: Array2D, *, where: str) -> None:
        self._values = values
        self.where = where
        self.shape = values.shape
        self.dtype = values.dtype
        self.index_dtype = None
        self.chunk_dtype = _get_values_dtype(values.dtype, where)
        self.nnz = None
        self.stored_bytes = values.stored_bytes
        self.filters = values.filters
        self.cold = values.cold
        chunks = values.chunks
        tall = chunks is not None and chunks[0] * self.shape[1] > chunks[1] * self.shape[0]
        self.axis = 1 if tall else 0

    @property
    def by_gene(self) -> bool:
        """Whether spans are columns."""
        return self.axis == 1

    def plan(self, *, max_values: int = DEFAULT_MAX_VALUES, start: int = 0, stop: int | None = None) -> list[Span]:
        """Divide the axis of the spans into whole storage chunks of about ``max_values`` values."""
        n, other = self.shape[self.axis], self.shape[1 - self.axis]
        stop = n if stop is None else stop
        chunks = self._values.chunks
        unit = chunks[self.axis] if chunks else 1
        step = max(1, max_values // max(other * unit, 1)) * unit
        item = self.stored_bytes / max(self.shape[0] * self.shape[1], 1)
        return cut_dense(start, stop, step, other, item)

    def read(self, span: Span, buffers: Buffers | None = None) -> DenseChunk:
        """Return the block of ``span``."""
        buffer = (buffers or Buffers()).data
        if self.axis == 0:
            block = self._values.read(span.start, span.stop, 0, self.shape[1], self.chunk_dtype, buffer)
            return DenseChunk(row_start=span.start, col_start=0, block=block)
        block = self._values.read(0, self.shape[0], span.start, span.stop, self.chunk_dtype, buffer)
        return DenseChunk(row_start=0, col_start=span.start, block=block)

    def read_block(self, r0: int, r1: int, c0: int, c1: int, buffers: Buffers | None = None) -> DenseChunk:
        """Return any block."""
        block = self._values.read(r0, r1, c0, c1, self.chunk_dtype, (buffers or Buffers()).data)
        return DenseChunk(row_start=r0, col_start=c0, block=block)


Matrix: TypeAlias = CsrMatrix | CscMatrix | DenseMatrix
