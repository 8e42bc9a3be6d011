"""Binomial thinning of counts: every molecule is kept with the same chance, whatever the layout or the chunks.

The molecules of a cell and gene have random numbers of their own, of the counter (cell, gene, number of the molecule)
by :func:`vcelltools.kernels.simulate.philox`; a molecule stays where its 64 bits are below the threshold. So the
result is exactly binomial, depends on the seed alone, and of two chances the smaller result lies within the larger.

Cost: a philox for two molecules. Oracle: the moments of ``scipy.stats.binom``.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.checks import check_count
from vcelltools.kernels.faults import MAX_COUNT, OK
from vcelltools.kernels.simulate import philox


@kernel()
def _thin_one(count, cell, gene, seed, threshold):
    """Return how many of ``count`` molecules stay."""
    kept = np.int64(0)
    for pair in range((count + 1) // 2):
        lane = np.uint64(gene) | (np.uint64(pair) << np.uint64(32))
        a, b = philox(seed, np.uint64(cell), lane)
        if a < threshold:
            kept += 1
        if 2 * pair + 1 < count and b < threshold:
            kept += 1
    return kept


@kernel()
def sparse_thin(indptr, indices, data, by_cell, start, seed, threshold, out):
    """Write the thinned counts of a sparse chunk; return (fault, position).

    Parameters
    ----------
    indptr, indices, data, by_cell, start
        The chunk, rows from cell ``start`` on, or columns from gene ``start`` on; no position may repeat.
    seed, threshold
        uint64: the seed, and the chance to stay times 2**64.
    out
        (nnz,) of the chunk's dtype.
    """
    for m in range(len(indptr) - 1):
        for j in range(indptr[m], indptr[m + 1]):
            fault = check_count(data[j], MAX_COUNT)
            if fault != OK:
                return fault, j
            cell, gene = (start + m, np.int64(indices[j])) if by_cell else (np.int64(indices[j]), start + m)
            out[j] = _thin_one(np.int64(data[j]), cell, gene, seed, threshold)
    return OK, 0


@kernel()
def dense_thin(block, row_start, col_start, seed, threshold, out):
    """Write the thinned counts of a dense (b, w) block to ``out`` (b * w,); return (fault, position)."""
    width = block.shape[1]
    for i in range(block.shape[0]):
        for c in range(width):
            value = block[i, c]
            if value == 0:
                out[i * width + c] = 0
                continue
            fault = check_count(value, MAX_COUNT)
            if fault != OK:
                return fault, i * width + c
            out[i * width + c] = _thin_one(np.int64(value), row_start + i, col_start + c, seed, threshold)
    return OK, 0
