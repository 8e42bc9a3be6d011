"""Moments of normalised values and of Pearson residuals, independent of the order of the cells.

A value is split into its floor and a fraction of 36 bits, which are summed as integers, so chunks, threads
and rows may come in any order and the sums stay the same to the bit. Rounding is at most 2**-37 per value; sums are
valid for up to 2**27 cells.

Oracles: ``tests.oracles.normalised_moments``, ``tests.oracles.pearson_residual_variance``.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

FRACTION = float(1 << 36)
MAX_CELLS = 1 << 27
TABLE = 64


@kernel(inline=True)
def _add_fixed(sums, i, x):
    """Add ``x`` to the fixed-point sum ``sums[i] = (floor part, fraction part)``."""
    whole = math.floor(x)
    i = np.uint64(i)  # unsigned, so that numba does not test for negative indices
    sums[i, 0] += np.int64(whole)
    sums[i, 1] += np.int64((x - whole) * 68719476736.0 + 0.5)


@kernel(inline=True)
def _add_moments(sum1, sum2, i, x, log):
    """Add a normalised value and its square."""
    if log:
        x = math.log1p(x)
    _add_fixed(sum1, i, x)
    _add_fixed(sum2, i, x * x)


@kernel()
def sparse_normalised_moments(
    indptr, indices, data, by_cell, start, batch_n, library_size_n, target_sum, log, n_genes, sum1, sum2
):
    """Add the sums and sums of squares of the normalised values of a sparse chunk.

    The value of a count c in a cell of library size L is c * target_sum / L, or log1p of that (``log``).

    Parameters
    ----------
    indptr, indices, data, by_cell, start
        The chunk: rows from cell ``start`` or columns from gene ``start``, already checked by a histogram kernel.
    batch_n, library_size_n
        (n,) int64: batch (-1 excludes the cell) and library size of each cell.
    target_sum, log
        float64 and bool.
    sum1, sum2
        (n_batches * g, 2) int64 fixed-point sums, added to.
    """
    for m in range(len(indptr) - 1):
        if by_cell:
            k = batch_n[start + m]
            if k < 0 or library_size_n[start + m] == 0:
                continue
            scale = target_sum / library_size_n[start + m]
            for j in range(indptr[m], indptr[m + 1]):
                i = k * n_genes + np.int64(indices[np.uint64(j)])
                _add_moments(sum1, sum2, i, data[np.uint64(j)] * scale, log)
        else:
            for j in range(indptr[m], indptr[m + 1]):
                cell = np.int64(indices[j])
                k = batch_n[cell]
                if k >= 0 and library_size_n[cell] != 0:
                    x = data[j] * (target_sum / library_size_n[cell])
                    _add_moments(sum1, sum2, k * n_genes + start + m, x, log)


@kernel()
def dense_normalised_moments(
    block, row_start, col_start, batch_n, library_size_n, target_sum, log, n_genes, sum1, sum2
):
    """Add a dense block; otherwise like :func:`sparse_normalised_moments`."""
    for r in range(block.shape[0]):
        cell = row_start + r
        if batch_n[cell] < 0 or library_size_n[cell] == 0:
            continue
        base = batch_n[cell] * n_genes + col_start
        scale = target_sum / library_size_n[cell]
        for c in range(block.shape[1]):
            if block[r, c] != 0:
                _add_moments(sum1, sum2, base + c, block[r, c] * scale, log)


@kernel(inline=True)
def _residual(count, mu, theta, clip):
    """Return the clipped Pearson residual under a negative binomial with mean ``mu`` and inverse dispersion theta."""
    r = (count - mu) / math.sqrt(mu + mu * mu / theta)
    return min(max(r, -clip), clip)


@kernel(inline=True)
def _add_residual(sum1, sum2, i, count, mu, theta, clip):
    """Add the difference between the residual of a count and that of a zero in its place."""
    x = _residual(count, mu, theta, clip)
    z = _residual(0.0, mu, theta, clip)
    _add_fixed(sum1, i, x - z)
    _add_fixed(sum2, i, x * x - z * z)


@kernel()
def sparse_residual_moments(
    indptr, indices, data, by_cell, start, batch_n, library_size_n, rate_kg, clip_k, theta, n_genes, sum1, sum2
):
    """Add, for each non-zero of a sparse chunk, the difference between its residual and that of a zero in its place.

    ``rate_kg`` is (n_batches * g,) float64: the fraction of the counts of a batch in a gene, so that mu = rate *
    library size. ``clip_k`` is (n_batches,). The chunk and the cells are as in :func:`sparse_normalised_moments`.
    Lause, Berens & Kobak, Genome Biology 2021, doi:10.1186/s13059-021-02451-7.
    """
    for m in range(len(indptr) - 1):
        for j in range(indptr[m], indptr[m + 1]):
            minor = np.int64(indices[j])
            cell, gene = (start + m, minor) if by_cell else (minor, start + m)
            k = batch_n[cell]
            if k >= 0 and data[j] != 0:
                i = k * n_genes + gene
                _add_residual(sum1, sum2, i, data[j], rate_kg[i] * library_size_n[cell], theta, clip_k[k])


@kernel()
def dense_residual_moments(
    block, row_start, col_start, batch_n, library_size_n, rate_kg, clip_k, theta, n_genes, sum1, sum2
):
    """Add the same differences for a dense block."""
    for r in range(block.shape[0]):
        k = batch_n[row_start + r]
        if k < 0:
            continue
        for c in range(block.shape[1]):
            if block[r, c] != 0:
                i = k * n_genes + col_start + c
                mu = rate_kg[i] * library_size_n[row_start + r]
                _add_residual(sum1, sum2, i, block[r, c], mu, theta, clip_k[k])


@kernel()
def zero_residual_moments(size_u, weight_u, rate_g, clip, theta, first, stop, sum1_g, sum2_g):
    """Sum the residuals (and their squares) of zeros in all cells, over unique library sizes.

    ``size_u`` and ``weight_u`` (u,) are the distinct library sizes and their numbers of cells. Fills genes
    ``first:stop`` of the (g,) float64 outputs; the cost is u per gene.
    """
    for g in range(first, stop):
        s1 = 0.0
        s2 = 0.0
        if rate_g[g] > 0:
            for u in range(len(size_u)):
                mu = rate_g[g] * size_u[u]
                if mu > 0:
                    z = _residual(0.0, mu, theta, clip)
                    s1 += weight_u[u] * z
                    s2 += weight_u[u] * z * z
        sum1_g[g] = s1
        sum2_g[g] = s2
