"""Convert row order to column order in bounded memory with two counting sorts, by bucket and by column."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, OK


@kernel()
def csr_bucket(indptr, indices, data, row_start, width, n_each, ends, rows_out, cols_out, data_out):
    """Sort a CSR block stably by column bucket (``column // width``); return ``OK`` or ``BAD_INDEX``.

    Parameters
    ----------
    indptr, indices, data
        (b + 1,) int64, (nnz,), (nnz,).
    row_start
        First row of the block.
    n_each
        (g,) int64, to which the number of values of each column is added.
    ends
        (buckets + 1,) int64 output: the bounds of the values of each bucket in the outputs.
    rows_out, cols_out, data_out
        (nnz,) int32, int32 and the dtype of ``data``.
    """
    n_minor = len(n_each)
    n_buckets = len(ends) - 1
    for k in range(n_buckets + 1):
        ends[k] = 0
    nnz = indptr[-1]
    for j in range(nnz):
        g = indices[j]
        if g < 0 or g >= n_minor:
            return BAD_INDEX
        n_each[g] += 1
        ends[g // width + 1] += 1
    for k in range(n_buckets):
        ends[k + 1] += ends[k]
    for i in range(len(indptr) - 1):
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[np.uint64(j)]
            k = np.uint64(g // width)
            at = np.uint64(ends[k])
            ends[k] += 1
            rows_out[at] = row_start + i
            cols_out[at] = g
            data_out[at] = data[np.uint64(j)]
    for k in range(n_buckets, 0, -1):  # the cursors are at the ends, so shift them back
        ends[k] = ends[k - 1]
    ends[0] = 0
    return OK


@kernel()
def csc_place(rows, cols, data, col_start, cursor, indices_out, data_out):
    """Write values of the columns ``col_start .. col_start + len(cursor) - 1`` at their cursors; skip other columns."""
    n = len(cursor)
    for j in range(len(rows)):
        c = cols[j] - col_start
        if 0 <= c < n:
            at = np.uint64(cursor[c])
            cursor[c] += 1
            indices_out[at] = rows[j]
            data_out[at] = data[j]
