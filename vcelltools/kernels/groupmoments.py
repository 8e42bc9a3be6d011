"""Group × gene moments of counts and cell sizes for a negative binomial fitted by the method of moments.

All sums are integers (the size of a cell is its total count), so they are exact in float64 below 2**53 and
do not depend on chunks or threads.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, OK


@kernel(inline=True)
def _add(k, g, value, size, sum_kg, square_kg, cross_kg):
    y = np.float64(value)
    sum_kg[k, g] += y
    square_kg[k, g] += y * y
    cross_kg[k, g] += y * size


@kernel()
def sparse_group_moments(indptr, indices, data, by_cell, start, codes_n, size_n, sum_kg, square_kg, cross_kg):
    """Add Σy, Σy² and Σ(y · size) of a sparse chunk; return (fault, position).

    Parameters
    ----------
    indptr, indices, data, by_cell, start
        The chunk: rows from cell ``start``, or columns from gene ``start``; indices unchecked.
    codes_n, size_n
        (n,) group of each cell (negative groups are skipped), and its size.
    sum_kg, square_kg, cross_kg
        (k, g) float64, added to.
    """
    n_minor = sum_kg.shape[1] if by_cell else len(codes_n)
    for m in range(len(indptr) - 1):
        at = start + m
        k = np.int64(codes_n[at]) if by_cell else np.int64(-1)
        size = np.float64(size_n[at]) if by_cell else 0.0
        for j in range(indptr[m], indptr[m + 1]):
            minor = np.int64(indices[j])
            if minor < 0 or minor >= n_minor:
                return BAD_INDEX, j
            if by_cell:
                if k >= 0:
                    _add(k, minor, data[j], size, sum_kg, square_kg, cross_kg)
            elif codes_n[minor] >= 0:
                _add(codes_n[minor], at, data[j], size_n[minor], sum_kg, square_kg, cross_kg)
    return OK, 0


@kernel()
def dense_group_moments(block, row_start, col_start, codes_n, size_n, sum_kg, square_kg, cross_kg):
    """Add the same sums for a dense block; return (fault, position)."""
    for i in range(block.shape[0]):
        k = codes_n[row_start + i]
        if k < 0:
            continue
        for c in range(block.shape[1]):
            if block[i, c] != 0:
                _add(k, col_start + c, block[i, c], size_n[row_start + i], sum_kg, square_kg, cross_kg)
    return OK, 0
