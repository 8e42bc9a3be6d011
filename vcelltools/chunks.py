"""What travels from the readers to the kernels: plain arrays, of a small fixed set of dtypes.

A chunk is some cells (or some genes) of a cells × genes matrix. The readers make every chunk C-contiguous,
native-endian and of one of the dtypes below, so that a kernel compiles once per file and not once per
storage detail. Indices are *not* trusted here: every kernel checks them while it uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

# storage dtype -> the dtype that chunks carry. Everything is exact: widening only, never narrowing.
DATA_DTYPES: dict[str, str] = {
    "int8": "int32",
    "int16": "int32",
    "int32": "int32",
    "uint8": "int32",
    "uint16": "int32",
    "uint32": "int64",
    "int64": "int64",
    "uint64": "int64",  # values above 2**63 - 1 turn negative and are refused as such
    "float16": "float32",
    "float32": "float32",
    "float64": "float64",
}
INDEX_DTYPES = ("int32", "int64")


def get_chunk_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype in which chunks carry values stored as ``dtype``.

    Raises
    ------
    KeyError
        When the storage dtype is not numeric (bool, strings, compounds).
    """
    return np.dtype(DATA_DTYPES[np.dtype(dtype).newbyteorder("=").name])


@dataclass(frozen=True, kw_only=True, slots=True)
class CsrChunk:
    """Rows ``start .. start + n_rows - 1`` of a CSR matrix.

    Attributes
    ----------
    start
        First cell of the chunk.
    indptr
        (b + 1,) int64, relative to this chunk: ``indptr[0] == 0``; monotone (the reader checked).
    indices
        (nnz,) int32 or int64 gene positions, unchecked, in storage order.
    data
        (nnz,) int32, int64, float32 or float64.
    n_genes
        Columns of the whole matrix.
    """

    start: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    n_genes: int

    @property
    def n_rows(self) -> int:
        """Cells in this chunk."""
        return len(self.indptr) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CscChunk:
    """Columns ``start .. start + n_cols - 1`` of a CSC matrix; fields as in :class:`CsrChunk`."""

    start: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    n_cells: int

    @property
    def n_cols(self) -> int:
        """Genes in this chunk."""
        return len(self.indptr) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseChunk:
    """A block of a dense matrix, C-contiguous (b, w): cells from ``row_start``, genes from ``col_start``."""

    row_start: int
    col_start: int
    block: np.ndarray


Chunk: TypeAlias = CsrChunk | CscChunk | DenseChunk
