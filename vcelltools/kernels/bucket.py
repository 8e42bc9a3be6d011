"""Bucket the chunks of a matrix by gene, as value bits and group codes, and check the values.

The values of a chunk are written contiguously, gene by gene, so that a gene can be gathered from all chunks without
transposing the matrix. Values are read as bits: the checks for sign, NaN and infinity are integer comparisons.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, DUPLICATE, NEGATIVE, NOT_FINITE, OK


@kernel()
def csr_bucket(indptr, indices, bits, codes_b, n_genes, magnitude, inf_bits, keys, groups, at, start_g, stop_g, seen_g):
    """Bucket one CSR chunk by gene into ``keys[at:]`` and ``groups[at:]``.

    Parameters
    ----------
    indptr, indices
        The chunk; indices are bounds-checked here.
    bits
        (nnz,) the bits of the values as uint32 or uint64.
    codes_b
        (b,) group of each cell; cells with a negative group are skipped.
    magnitude, inf_bits
        For the float type, the mask of all bits except the sign, and the bits of +inf.
    start_g, stop_g
        (g,) int64 outputs: the range of each gene's values in ``keys``.
    seen_g
        (g,) int32 workspace.

    Returns
    -------
    fault, position, kept
        OK, or the fault and its position in ``indices``; and the number of values kept.
    """
    n = len(indptr) - 1
    seen_g[:] = -1
    start_g[:] = 0
    marked = -1
    for i in range(n):
        leave_out = codes_b[i] < 0
        last = -1
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[np.uint64(j)]
            if g < 0 or g >= n_genes:
                return BAD_INDEX, j, 0
            v = bits[np.uint64(j)]
            if marked == i:
                if seen_g[g] == i:
                    return DUPLICATE, j, 0
                seen_g[g] = i
            elif g > last:
                last = g
            else:  # not in order, so a gene may occur twice: from here on, check the genes that the row has had
                marked = i
                for q in range(indptr[i], j + 1):
                    if seen_g[indices[q]] == i:
                        return DUPLICATE, q, 0
                    seen_g[indices[q]] = i
            if v != 0 and v < inf_bits:
                if not leave_out:
                    start_g[g] += 1
            elif v & inf_bits == inf_bits:
                return NOT_FINITE, j, 0
            elif v & magnitude != 0:
                return NEGATIVE, j, 0
    position = at
    for g in range(n_genes):
        count = start_g[g]
        start_g[g] = position
        stop_g[g] = position
        position += count
    for i in range(n):
        code = codes_b[i]
        if code < 0:
            continue
        for j in range(indptr[i], indptr[i + 1]):
            v = bits[np.uint64(j)]
            if v & magnitude != 0:
                g = np.uint64(indices[np.uint64(j)])
                k = stop_g[g]
                stop_g[g] = k + 1
                keys[np.uint64(k)] = v
                groups[np.uint64(k)] = code
    return OK, 0, position - at


@kernel()
def csc_bucket(
    indptr, indices, bits, codes_n, first_gene, magnitude, inf_bits, keys, groups, at, start_g, stop_g, seen_n
):
    """Bucket the columns of a CSC chunk; arguments as in :func:`csr_bucket`, ``seen_n`` per cell."""
    n_cells = len(codes_n)
    position = at
    seen_n[:] = -1
    for c in range(len(indptr) - 1):
        start_g[first_gene + c] = position
        for j in range(indptr[c], indptr[c + 1]):
            i = indices[j]
            if i < 0 or i >= n_cells:
                return BAD_INDEX, j, 0
            if seen_n[i] == c:
                return DUPLICATE, j, 0
            seen_n[i] = c
            v = bits[j]
            if v & inf_bits == inf_bits:
                return NOT_FINITE, j, 0
            if v > magnitude and v & magnitude != 0:
                return NEGATIVE, j, 0
            if codes_n[i] >= 0 and v & magnitude != 0:
                keys[position] = v
                groups[position] = codes_n[i]
                position += 1
        stop_g[first_gene + c] = position
    return OK, 0, position - at


@kernel()
def dense_bucket(block, codes_b, first_gene, magnitude, inf_bits, keys, groups, at, start_g, stop_g):
    """Bucket a dense block (b, w) of value bits; arguments as in :func:`csr_bucket`."""
    n, w = block.shape
    for c in range(w):
        start_g[first_gene + c] = 0
    for i in range(n):
        leave_out = codes_b[i] < 0
        for c in range(w):
            v = block[i, c]
            if v & inf_bits == inf_bits:
                return NOT_FINITE, i * w + c, 0
            if v > magnitude and v & magnitude != 0:
                return NEGATIVE, i * w + c, 0
            if not leave_out and v & magnitude != 0:
                start_g[first_gene + c] += 1
    position = at
    for c in range(first_gene, first_gene + w):
        count = start_g[c]
        start_g[c] = position
        stop_g[c] = position
        position += count
    for i in range(n):
        code = codes_b[i]
        if code < 0:
            continue
        for c in range(w):
            v = block[i, c]
            if v & magnitude != 0:
                k = stop_g[first_gene + c]
                keys[k] = v
                groups[k] = code
                stop_g[first_gene + c] = k + 1
    return OK, 0, position - at
