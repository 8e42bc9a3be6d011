"""The chunks that readers pass to kernels: plain arrays of a small, fixed set of dtypes.

A chunk holds some cells (or some genes) of a cells × genes matrix. The readers make every chunk C-contiguous,
native-endian and of one of the dtypes below, so that a kernel is compiled once per dtype and not once per
storage detail. Indices are *not* checked here: every kernel checks them while it uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

R = TypeVar("R")

# storage dtype -> dtype in chunks. The conversion is exact, because it only widens.
DATA_DTYPES: dict[str, str] = {
    "int8": "int32",
    "int16": "int32",
    "int32": "int32",
    "uint8": "int32",
    "uint16": "int32",
    "uint32": "int64",
    "int64": "int64",
    "uint64": "int64",  # values above 2**63 - 1 become negative and are rejected as such
    "float16": "float32",
    "float32": "float32",
    "float64": "float64",
}


def get_chunk_dtype(dtype: np.dtype) -> np.dtype:
    """Return the chunk dtype of values stored as ``dtype``.

    Raises
    ------
    KeyError
        When the storage dtype is not numeric (bool, strings, compounds).
    """
    return np.dtype(DATA_DTYPES[np.dtype(dtype).newbyteorder("=").name])


def compress_rows(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the non-zeros of a dense (b, w) block as CSR: ``indptr`` int64, ``indices`` int32, ``data``."""
    rows, indices = np.nonzero(block)
    indptr = np.zeros(len(block) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(block)), out=indptr[1:])
    return indptr, indices.astype(np.int32), block[rows, indices]


@dataclass(frozen=True, kw_only=True, slots=True)
class _SparseChunk:
    """What chunks of CSR and CSC share: ``start`` and ``indptr`` count along the major axis."""

    start: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """(nnz,) stored values, in storage order."""
        return self.data

    @property
    def n_minor(self) -> int:
        """The bound of ``indices``."""
        raise NotImplementedError

    @property
    def n_major(self) -> int:
        """Rows of a CSR chunk, columns of a CSC chunk."""
        return len(self.indptr) - 1

    def get_major(self) -> np.ndarray:
        """Return the (nnz,) int64 row (CSR) or column (CSC) of every stored value."""
        return np.repeat(np.arange(self.start, self.start + self.n_major), np.diff(self.indptr))

    def find_outside(self) -> int | None:
        """Return the first position in ``indices`` that lies outside the matrix."""
        n, indices = self.n_minor, self.indices
        if not len(indices) or (int(indices.min()) >= 0 and int(indices.max()) < n):
            return None
        return int(np.flatnonzero((indices < 0) | (indices >= n))[0])

    def locate_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the cell and the gene of every one of :attr:`values`; the indices are not checked."""
        raise NotImplementedError

    def get_entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (cell, gene, value) of every stored value; the indices are not checked."""
        return *self.locate_values(), self.data

    def _find_major(self, position: int) -> int:
        return self.start + int(np.searchsorted(self.indptr, position, side="right")) - 1

    def copy(self) -> Any:
        """Return the chunk with arrays of its own: a reader uses its buffers again."""
        return replace(self, indices=self.indices.copy(), data=self.data.copy())


@dataclass(frozen=True, kw_only=True, slots=True)
class CsrChunk(_SparseChunk):
    """Rows ``start .. start + n_rows - 1`` of a CSR matrix.

    Attributes
    ----------
    start
        First cell of the chunk.
    indptr
        (b + 1,) int64, relative to this chunk, so ``indptr[0] == 0``; monotone, as checked by the reader.
    indices
        (nnz,) int32 or int64 gene positions, unchecked, in storage order.
    data
        (nnz,) int32, int64, float32 or float64.
    n_genes
        Number of columns of the whole matrix.
    """

    n_genes: int

    @property
    def n_rows(self) -> int:
        """Number of cells in this chunk."""
        return self.n_major

    @property
    def n_minor(self) -> int:
        """The bound of ``indices``."""
        return self.n_genes

    @property
    def cells(self) -> slice:
        """The range of cells in the chunk."""
        return slice(self.start, self.start + self.n_major)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the cell and the gene of a position in :attr:`values`."""
        return self._find_major(position), int(self.indices[position])

    def locate_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the cell and the gene of every one of :attr:`values`; the genes are not checked."""
        return self.get_major(), self.indices

    def spread(self, value_n: np.ndarray) -> np.ndarray:
        """Return the entry of ``value_n`` (n,) for the cell of each value, in the order of :attr:`values`."""
        return np.repeat(value_n[self.cells], np.diff(self.indptr))

    def run(self, sparse: Callable[..., R], dense: Callable[..., R], *args: Any) -> R:
        """Call the kernel for this layout.

        The call is ``sparse(indptr, indices, data, by_cell, start, *args)`` or ``dense(block, row_start, col_start,
        *args)``. Arrays over cells in ``args`` cover all cells of the matrix.
        """
        return sparse(self.indptr, self.indices, self.data, True, self.start, *args)


@dataclass(frozen=True, kw_only=True, slots=True)
class CscChunk(_SparseChunk):
    """Columns ``start .. start + n_cols - 1`` of a CSC matrix, with the fields and methods of :class:`CsrChunk`."""

    n_cells: int

    @property
    def n_cols(self) -> int:
        """Number of genes in this chunk."""
        return self.n_major

    @property
    def n_minor(self) -> int:
        """The bound of ``indices``."""
        return self.n_cells

    @property
    def cells(self) -> slice:
        """The range of cells in the chunk, which is all cells."""
        return slice(0, self.n_cells)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the cell and the gene of a position in :attr:`values`."""
        return int(self.indices[position]), self._find_major(position)

    def locate_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the cell and the gene of every one of :attr:`values`; the cells are not checked."""
        return self.indices, self.get_major()

    def spread(self, value_n: np.ndarray) -> np.ndarray:
        """Return the entry of ``value_n`` (n,) for the cell of each stored value; the indices are not checked."""
        return value_n[self.indices]

    def run(self, sparse: Callable[..., R], dense: Callable[..., R], *args: Any) -> R:
        """Call the kernel for this layout; see :meth:`CsrChunk.run`."""
        return sparse(self.indptr, self.indices, self.data, False, self.start, *args)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseChunk:
    """A block of a dense matrix, C-contiguous (b, w): cells from ``row_start``, genes from ``col_start``."""

    row_start: int
    col_start: int
    block: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """(b * w,) stored values, in storage order."""
        return self.block.reshape(-1)

    @property
    def cells(self) -> slice:
        """The range of cells in the chunk."""
        return slice(self.row_start, self.row_start + len(self.block))

    @property
    def genes(self) -> slice:
        """The range of genes in the chunk."""
        return slice(self.col_start, self.col_start + self.block.shape[1])

    def copy(self) -> Any:
        """Return a copy of the chunk, because a reader reuses its buffers."""
        return replace(self, block=self.block.copy())

    def locate(self, position: int) -> tuple[int, int]:
        """Return the cell and the gene of a position in :attr:`values`."""
        row, column = divmod(int(position), self.block.shape[1])
        return self.row_start + row, self.col_start + column

    def find_outside(self) -> int | None:
        """Return None: a block holds no indices."""
        return None

    def locate_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the cell and the gene of every one of :attr:`values`."""
        rows, columns = np.indices(self.block.shape).reshape(2, -1)
        return rows + self.row_start, columns + self.col_start

    def get_entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (cell, gene, value) of every value that is not 0."""
        rows, columns = np.nonzero(self.block)
        return rows + self.row_start, columns + self.col_start, self.block[rows, columns]

    def spread(self, value_n: np.ndarray) -> np.ndarray:
        """Return the entry of ``value_n`` (n,) for the cell of each value, in the order of :attr:`values`."""
        return np.repeat(value_n[self.cells], self.block.shape[1])

    def run(self, sparse: Callable[..., R], dense: Callable[..., R], *args: Any) -> R:
        """Call the kernel for this layout; see :meth:`CsrChunk.run`."""
        return dense(self.block, self.row_start, self.col_start, *args)


Chunk: TypeAlias = CsrChunk | CscChunk | DenseChunk
