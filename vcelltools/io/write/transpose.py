"""Convert rows to columns in bounded memory: values are spilled to a temporary file, sorted by column bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.direct import pread_into
from vcelltools.io.spill import pwrite_from
from vcelltools.io.write.atomic import translate_os_errors

_BUCKET_VALUES = 6_000_000


class ColumnSpill:
    """Collects CSR blocks in row order and yields CSC blocks in column order; a context manager.

    Parameters
    ----------
    folder
        Folder of the temporary file, which has no name and disappears with the process.
    n_minor
        Number of columns (or rows, if the blocks are CSC: the same code converts columns to rows).
    nnz
        An estimate, which determines the number of buckets.
    """

    def __init__(self, folder: Path, *, n_minor: int, nnz: int) -> None:
        n_buckets = max(1, min(n_minor, -(-nnz // _BUCKET_VALUES), 4096))
        self.width = -(-n_minor // n_buckets)
        self.n_buckets = -(-n_minor // self.width)
        self.n_each = np.zeros(n_minor, np.int64)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        self._at = 0
        self._segments: list[list[tuple[int, int]]] = [[] for _ in range(self.n_buckets)]
        self._dtype: np.dtype | None = None
        self._n_rows = 0

    def __enter__(self) -> ColumnSpill:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    @property
    def nnz(self) -> int:
        """Number of values so far."""
        return int(self.n_each.sum())

    def append(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Append the next rows.

        Raises
        ------
        DataError
            If a column index is outside the matrix.
        """
        from vcelltools.kernels.transpose import csr_bucket

        nnz = len(data)
        self._dtype = self._dtype or data.dtype
        rows, cols, values = np.empty(nnz, np.int32), np.empty(nnz, np.int32), np.empty(nnz, data.dtype)
        ends = np.empty(self.n_buckets + 1, np.int64)
        fault = csr_bucket(indptr, indices, data, self._n_rows, self.width, self.n_each, ends, rows, cols, values)
        if fault:
            raise DataError(f"rows from {self._n_rows:,}: a column index outside 0 … {len(self.n_each) - 1:,}")
        self._n_rows += len(indptr) - 1
        with translate_os_errors(self._folder):
            for k in range(self.n_buckets):
                a, b = int(ends[k]), int(ends[k + 1])
                if a == b:
                    continue
                self._segments[k].append((self._at, b - a))
                for part in (rows, cols, values):
                    self._at += pwrite_from(self._file.fileno(), part[a:b], self._at)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (indptr, indices, data) of consecutive column ranges; rows ascend within each column."""
        from vcelltools.kernels.transpose import csc_place

        dtype = self._dtype or np.dtype(np.int32)
        n_minor = len(self.n_each)
        for k in range(self.n_buckets):
            c0, stop = k * self.width, min((k + 1) * self.width, n_minor)
            while c0 < stop:
                total = np.cumsum(self.n_each[c0:stop])
                c1 = c0 + max(1, int(np.searchsorted(total, 2 * _BUCKET_VALUES, side="right")))
                indptr = np.zeros(c1 - c0 + 1, np.int64)
                np.cumsum(self.n_each[c0:c1], out=indptr[1:])
                indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], dtype)
                cursor = indptr[:-1].copy()
                for at, n in self._segments[k]:
                    rows, cols, values = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, dtype)
                    for part in (rows, cols, values):
                        pread_into(self._file.fileno(), part, at, "the temporary file")
                        at += part.nbytes  # noqa: PLW2901
                    csc_place(rows, cols, values, c0, cursor, indices, data)
                yield indptr, indices, data
                c0 = c1
