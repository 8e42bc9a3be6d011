"""Group × gene moments of counts with cell sizes: what a method-of-moments negative binomial needs.

All sums are of whole numbers (the size of a cell is its total count), so they are exact in float64 below 2**53 and
do not depend on chunks or threads.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def csr_group_moments(indptr, indices, data, codes_b, size_b, sum_kg, square_kg, cross_kg):  # pragma: no cover
    """Add Σy, Σy² and Σ(y · size) of a CSR chunk; returns the position of a bad index, or -1."""
    n_genes = sum_kg.shape[1]
    for i in range(len(indptr) - 1):
        k = codes_b[i]
        s = size_b[i]
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[j]
            if g < 0 or g >= n_genes:
                return j
            if k >= 0:
                y = np.float64(data[j])
                sum_kg[k, g] += y
                square_kg[k, g] += y * y
                cross_kg[k, g] += y * s
    return -1


@kernel()
def csc_group_moments(indptr, indices, data, first, codes_n, size_n, sum_kg, square_kg, cross_kg):  # pragma: no cover
    """Add the same of columns from gene ``first`` on."""
    n_cells = len(codes_n)
    for c in range(len(indptr) - 1):
        for j in range(indptr[c], indptr[c + 1]):
            i = indices[j]
            if i < 0 or i >= n_cells:
                return j
            k = codes_n[i]
            if k >= 0:
                y = np.float64(data[j])
                sum_kg[k, first + c] += y
                square_kg[k, first + c] += y * y
                cross_kg[k, first + c] += y * size_n[i]
    return -1


@kernel()
def dense_group_moments(block, first, codes_b, size_b, sum_kg, square_kg, cross_kg):  # pragma: no cover
    """Add the same of a dense block whose first column is gene ``first``."""
    for i in range(block.shape[0]):
        k = codes_b[i]
        if k < 0:
            continue
        for c in range(block.shape[1]):
            y = np.float64(block[i, c])
            if y != 0:
                sum_kg[k, first + c] += y
                square_kg[k, first + c] += y * y
                cross_kg[k, first + c] += y * size_b[i]
    return -1
