"""Group × gene sums, sums of squares and numbers of positive values, independent of the order of the cells.

Sums are kept in fixed point, as in :mod:`vcelltools.kernels.moments`: the floor of a value and a fraction of 36 bits,
each an integer. Whole numbers are exact; other values are rounded by at most 2**-37. Chunks, threads and rows may come
in any order, and the sums stay equal to the bit. They hold for up to 2**27 cells.

Oracle: numpy on a dense matrix.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, DUPLICATE, NEGATIVE, NOT_FINITE, OK
from vcelltools.kernels.moments import FRACTION, _add_fixed


@kernel(inline=True)
def _check(index, value, n_minor, seen, stamp):
    """Return the fault of one entry, and mark its index as seen in this row or column."""
    if index < 0 or index >= n_minor:
        return BAD_INDEX
    if not math.isfinite(value):
        return NOT_FINITE
    if value < 0:
        return NEGATIVE
    if seen[index] == stamp:
        return DUPLICATE
    seen[index] = stamp
    return OK


@kernel()
def check_entries(indptr, indices, data, n_minor, seen, first_stamp):
    """Find the first entry of a sparse chunk that is invalid, or that repeats a position; return (fault, position).

    Parameters
    ----------
    indptr, indices, data
        The chunk.
    n_minor
        The number of genes (of rows) or cells (of columns).
    seen, first_stamp
        (n_minor,) int64 scratch, all of whose values are below ``first_stamp``; rows are marked with the numbers from
        ``first_stamp`` on.
    """
    for m in range(len(indptr) - 1):
        for j in range(indptr[m], indptr[m + 1]):
            fault = _check(np.int64(indices[j]), data[j], n_minor, seen, first_stamp + m)
            if fault != OK:
                return fault, j
    return OK, 0


@kernel()
def sparse_group_sums(indptr, indices, data, by_cell, start, codes_n, n_genes, sums, squares, nnz):
    """Add Σx, Σx² and the number of positive values of a sparse chunk to its cells' groups.

    Parameters
    ----------
    indptr, indices, data, by_cell, start
        The chunk, rows from cell ``start`` on, or columns from gene ``start`` on; :func:`check_entries` passed it.
    codes_n
        (n,) group of every cell (negative: left out).
    n_genes
        Width of the matrix.
    sums, squares
        (k * g, 2) int64 fixed-point sums, added to; ``squares`` of no rows is left alone.
    nnz
        (k * g,) int64, added to.
    """
    with_squares = len(squares) > 0
    for m in range(len(indptr) - 1):
        at = start + m
        k = np.int64(codes_n[at]) if by_cell else np.int64(-1)
        if by_cell and k < 0:
            continue
        for j in range(indptr[m], indptr[m + 1]):
            minor = np.int64(indices[j])
            if by_cell:
                i = k * n_genes + minor
            else:
                k = np.int64(codes_n[minor])
                if k < 0:
                    continue
                i = k * n_genes + at
            x = np.float64(data[j])
            if x > 0:
                nnz[i] += 1
                _add_fixed(sums, i, x)
                if with_squares:
                    _add_fixed(squares, i, x * x)


@kernel()
def dense_group_sums(block, row_start, col_start, codes_n, n_genes, sums, squares, nnz):
    """Add the same of a dense block, which :func:`vcelltools.kernels.scan.scan_values` passed."""
    with_squares = len(squares) > 0
    for r in range(block.shape[0]):
        k = np.int64(codes_n[row_start + r])
        if k < 0:
            continue
        for c in range(block.shape[1]):
            x = np.float64(block[r, c])
            if x > 0:
                i = k * n_genes + col_start + c
                nnz[i] += 1
                _add_fixed(sums, i, x)
                if with_squares:
                    _add_fixed(squares, i, x * x)


def to_float(sums: np.ndarray) -> np.ndarray:
    """Return fixed-point sums (..., 2) as float64."""
    return sums[..., 0] + sums[..., 1] / FRACTION
