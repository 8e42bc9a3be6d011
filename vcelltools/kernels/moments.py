"""Moments of normalised values and of Pearson residuals, independent of the order in which cells are visited.

A value is split into its floor and a fraction of 36 bits, and both are summed as integers, so chunks, threads
and rows may come in any order and the sums stay equal to the bit. Rounding is at most 2**-37 a value; sums hold
for up to 2**27 cells.

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
    i = np.uint64(i)  # or every index would be tested for counting from the end
    sums[i, 0] += np.int64(whole)
    sums[i, 1] += np.int64((x - whole) * 68719476736.0 + 0.5)


@kernel()
def csr_normalised_moments(indptr, indices, data, batch_b, library_size_b, target_sum, log, n_genes, sum1, sum2):
    """Add the sums and sums of squares of the normalised values of a CSR chunk.

    The value of a count c in a cell of library size L is c * target_sum / L, or log1p of that (``log``).

    Parameters
    ----------
    indptr, indices, data
        The chunk, already checked by :func:`vcelltools.kernels.histogram.csr_histogram`.
    batch_b, library_size_b
        (b,) int64: batch (-1: left out) and library size of each row.
    target_sum, log
        float64 and bool.
    sum1, sum2
        (n_batches * g, 2) int64 fixed-point sums, added to.
    """
    for r in range(len(indptr) - 1):
        if batch_b[r] < 0 or library_size_b[r] == 0:
            continue
        base = batch_b[r] * n_genes
        scale = target_sum / library_size_b[r]
        for j in range(indptr[r], indptr[r + 1]):
            x = data[np.uint64(j)] * scale
            if log:
                x = math.log1p(x)
            i = base + np.int64(indices[np.uint64(j)])
            _add_fixed(sum1, i, x)
            _add_fixed(sum2, i, x * x)


@kernel()
def csc_normalised_moments(
    indptr, indices, data, first_col, batch_n, library_size_n, target_sum, log, n_genes, sum1, sum2
):
    """Add the columns of a CSC chunk; ``batch_n`` and ``library_size_n`` are (n,) over all cells."""
    for k in range(len(indptr) - 1):
        for j in range(indptr[k], indptr[k + 1]):
            i = np.int64(indices[j])
            if batch_n[i] < 0 or library_size_n[i] == 0:
                continue
            x = data[j] * (target_sum / library_size_n[i])
            if log:
                x = math.log1p(x)
            at = batch_n[i] * n_genes + first_col + k
            _add_fixed(sum1, at, x)
            _add_fixed(sum2, at, x * x)


@kernel()
def dense_normalised_moments(block, first_col, batch_b, library_size_b, target_sum, log, n_genes, sum1, sum2):
    """Add a dense block; ``batch_b`` and ``library_size_b`` belong to its rows."""
    n_rows, width = block.shape
    for r in range(n_rows):
        if batch_b[r] < 0 or library_size_b[r] == 0:
            continue
        base = batch_b[r] * n_genes + first_col
        scale = target_sum / library_size_b[r]
        for c in range(width):
            v = block[r, c]
            if v == 0:
                continue
            x = v * scale
            if log:
                x = math.log1p(x)
            _add_fixed(sum1, base + c, x)
            _add_fixed(sum2, base + c, x * x)


@kernel(inline=True)
def _residual(count, mu, theta, clip):
    """Clipped Pearson residual of a count under a negative binomial of mean ``mu`` and inverse dispersion theta."""
    r = (count - mu) / math.sqrt(mu + mu * mu / theta)
    return min(max(r, -clip), clip)


@kernel()
def csr_residual_moments(indptr, indices, data, batch_b, library_size_b, rate_kg, clip_k, theta, n_genes, sum1, sum2):
    """Add, for each non-zero of a CSR chunk, what its residual adds beyond the residual of a zero in its place.

    ``rate_kg`` is (n_batches * g,) float64: a gene's share of its batch's counts, so that mu = rate * library
    size. ``clip_k`` is (n_batches,). Lause, Berens & Kobak, Genome Biology 2021, doi:10.1186/s13059-021-02451-7.
    """
    for r in range(len(indptr) - 1):
        k = batch_b[r]
        if k < 0:
            continue
        for j in range(indptr[r], indptr[r + 1]):
            if data[j] == 0:
                continue
            at = k * n_genes + np.int64(indices[j])
            mu = rate_kg[at] * library_size_b[r]
            x = _residual(data[j], mu, theta, clip_k[k])
            z = _residual(0.0, mu, theta, clip_k[k])
            _add_fixed(sum1, at, x - z)
            _add_fixed(sum2, at, x * x - z * z)


@kernel()
def csc_residual_moments(
    indptr, indices, data, first_col, batch_n, library_size_n, rate_kg, clip_k, theta, n_genes, sum1, sum2
):
    """The same for the columns of a CSC chunk."""
    for c in range(len(indptr) - 1):
        for j in range(indptr[c], indptr[c + 1]):
            i = np.int64(indices[j])
            k = batch_n[i]
            if k < 0 or data[j] == 0:
                continue
            at = k * n_genes + first_col + c
            mu = rate_kg[at] * library_size_n[i]
            x = _residual(data[j], mu, theta, clip_k[k])
            z = _residual(0.0, mu, theta, clip_k[k])
            _add_fixed(sum1, at, x - z)
            _add_fixed(sum2, at, x * x - z * z)


@kernel()
def dense_residual_moments(block, first_col, batch_b, library_size_b, rate_kg, clip_k, theta, n_genes, sum1, sum2):
    """The same for a dense block."""
    n_rows, width = block.shape
    for r in range(n_rows):
        k = batch_b[r]
        if k < 0:
            continue
        for c in range(width):
            if block[r, c] == 0:
                continue
            at = k * n_genes + first_col + c
            mu = rate_kg[at] * library_size_b[r]
            x = _residual(block[r, c], mu, theta, clip_k[k])
            z = _residual(0.0, mu, theta, clip_k[k])
            _add_fixed(sum1, at, x - z)
            _add_fixed(sum2, at, x * x - z * z)


@kernel(parallel=False)
def zero_residual_moments(size_u, weight_u, rate_g, clip, theta, first, stop, sum1_g, sum2_g):
    """Sum the residuals (and their squares) that every cell would have with a zero, over unique library sizes.

    ``size_u`` and ``weight_u`` (u,): the library sizes that occur, and how many cells have each. Fills genes
    ``first:stop`` of the (g,) float64 outputs; cost u a gene.
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
