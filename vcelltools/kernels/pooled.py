"""Sum the values of a population per gene, and per batch and gene."""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

_LOW = 0xFFFFFFFF


@kernel()
def add_counts(indptr, indices, data, batch, sums, low, high, n_positive):
    """Sum counts exactly; the sums of squares are ``low + 2**32 × high``.

    Parameters
    ----------
    indptr, indices, data
        (b + 1,) int64, (nnz,), (nnz,): rows with every gene once.
    batch
        (b,) int64 batch of each cell.
    sums
        (k, g) int64, added to.
    low, high, n_positive
        (g,) int64, added to: sums of squares, and numbers of cells with a count.
    """
    for i in range(len(indptr) - 1):
        k = batch[i]
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[j]
            v = np.int64(data[j])
            sums[k, g] += v
            low[g] += (v * v) & _LOW
            high[g] += (v * v) >> 32
            n_positive[g] += 1


@kernel()
def add_values(indptr, indices, data, factor, logarithm, batch, sums, squares):
    """Sum ``f(count × factor of the cell)``, where f is the identity or log1p.

    Parameters
    ----------
    factor
        (b,) float64.
    logarithm
        Whether f is log1p.
    sums, squares
        (k, g) and (g,) float64, added to in the order of the cells.
    """
    for i in range(len(indptr) - 1):
        k = batch[i]
        f = factor[i]
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[j]
            x = data[j] * f
            if logarithm:
                x = math.log1p(x)
            sums[k, g] += x
            squares[g] += x * x
