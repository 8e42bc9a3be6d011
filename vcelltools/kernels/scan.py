"""Scan the values of a matrix: check them, sum them by cell, and hash cells."""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, NEGATIVE, NOT_FINITE, OK


@kernel()
def scan_values(data, threshold):
    """Find the first invalid value, and check whether any fractional part exceeds ``threshold``.

    Returns
    -------
    fault, position, has_fraction
        The fault and position of the first negative or non-finite value, or OK.
    """
    has_fraction = False
    for i in range(len(data)):
        v = data[i]
        if not math.isfinite(v):
            return NOT_FINITE, i, has_fraction
        if v < 0:
            return NEGATIVE, i, has_fraction
        if v - math.floor(v) > threshold:
            has_fraction = True
    return OK, 0, has_fraction


@kernel()
def csr_row_sums(indptr, data, natural, out_b):
    """Sum every row in float64; with ``natural``, sum expm1 of the values."""
    for i in range(len(indptr) - 1):
        total = 0.0
        for j in range(indptr[i], indptr[i + 1]):
            total += math.expm1(data[j]) if natural else data[j]
        out_b[i] = total


@kernel()
def csc_row_sums(indices, data, natural, out_n):
    """Add every value of some columns to the total of its cell; return (fault, position)."""
    n = len(out_n)
    for j in range(len(indices)):
        i = indices[j]
        if i < 0 or i >= n:
            return BAD_INDEX, j
        out_n[i] += math.expm1(data[j]) if natural else data[j]
    return OK, 0


@kernel(inline=True)
def _mix(gene, bits):
    """Return a 64-bit hash of a gene and the bits of its value (the finaliser of MurmurHash3, Appleby)."""
    x = (np.uint64(gene) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(bits)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


SQUARES = 2.0**36
"""Squares are rounded to multiples of its inverse, so their sums are exact, in any order, up to 2**17.

The squares of log1p CP10K values of a cell add up to less than 2**13.
"""


@kernel(inline=True)
def _square(value):
    v = np.float64(value)
    return math.floor(v * v * SQUARES + 0.5) / SQUARES


@kernel()
def csr_hash_cells(indptr, indices, data, bits, first, hash_b, square_b):
    """Add the hashes of non-zero values to (b,) uint64 hashes of their rows, and their squares to ``square_b``.

    A hash does not depend on the order of the values. ``first`` is the gene of the first column, and ``bits`` are the
    values as unsigned integers. ``square_b`` may be empty. Cost: one pass over the values, vectorised without squares.
    Oracle: equal rows of numpy.
    """
    for i in range(len(indptr) - 1):
        genes, words = indices[indptr[i] : indptr[i + 1]], bits[indptr[i] : indptr[i + 1]]
        total = np.uint64(0)
        for j in range(len(genes)):
            total += _mix(first + genes[j], words[j]) if words[j] != 0 else np.uint64(0)
        hash_b[i] += total
        if len(square_b) > 0:
            square = 0.0
            for j in range(indptr[i], indptr[i + 1]):
                square += _square(data[j])
            square_b[i] += square


@kernel()
def csc_hash_cells(indptr, indices, data, bits, first, hash_n, square_n):
    """Like :func:`csr_hash_cells`, for columns from ``first`` on; cell indices out of range are ignored."""
    n = len(hash_n)
    for g in range(len(indptr) - 1):
        for j in range(indptr[g], indptr[g + 1]):
            i = indices[j]
            if 0 <= i < n and bits[j] != 0:
                hash_n[i] += _mix(first + g, bits[j])
                if len(square_n) > 0:
                    square_n[i] += _square(data[j])


@kernel()
def dense_hash_cells(block, bits_bw, first, hash_b, square_b):
    """Like :func:`csr_hash_cells`, for a dense block whose first column is ``first``."""
    for i in range(bits_bw.shape[0]):
        total, square = np.uint64(0), 0.0
        for w in range(bits_bw.shape[1]):
            if bits_bw[i, w] != 0:
                total += _mix(first + w, bits_bw[i, w])
                square += _square(block[i, w])
        hash_b[i] += total
        if len(square_b) > 0:
            square_b[i] += square
