"""Normalise counts to CP10K and log1p, in every layout.

value = log1p(count * scale) with scale = target sum / library size of the cell, divided by log(base) if a
base is given. Small counts repeat within a cell, so their values are looked up: log1p runs once per cell and
distinct small count. Computed in float64, stored as float32. Oracle: scanpy's normalize_total and log1p.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.checks import check_count, check_entry
from vcelltools.kernels.faults import BAD_INDEX, NOT_SORTED, OK

TABLE = 64  # smaller counts are looked up within a cell
BLOCK = 512  # number of values that are checked and then looked up together
CELL_TABLE = 4  # for CSC, where cells come in any order, the values of counts 1 … 4 are kept for every cell
LARGEST = float(1 << 53)


def make_scale(library_size_n: np.ndarray, target_sum: float) -> np.ndarray:
    """Return (n,) float64 ``target_sum / library_size``; 0 for cells without counts, whose values stay 0."""
    size = np.asarray(library_size_n, np.float64)
    return np.divide(target_sum, size, out=np.zeros(len(size)), where=size > 0)


@kernel(inline=True)
def _to_small(values, out):
    """Write whole numbers below TABLE as int32, and -1 for everything else; there are no branches, so it vectorises."""
    for j in range(len(values)):
        v = values[j]
        ordinary = (v >= 0) & (v < TABLE)
        c = np.int32(v if ordinary else values.dtype.type(0))
        out[j] = c if ordinary & (c == v) else np.int32(-1)


@kernel(inline=True)
def _find_disorder(indices, a, b, n_genes):
    """Return the first position in ``a:b`` that is out of range or does not increase, or -1."""
    part = indices[a:b]
    bad = np.int32(0)
    for j in range(1, len(part)):
        bad |= np.int32(part[j] <= part[j - 1])
    if bad == 0 and (b == a or (part[0] >= 0 and part[len(part) - 1] < n_genes)):
        return np.int64(-1)
    for j in range(a, b):
        if indices[j] < 0 or indices[j] >= n_genes or (j > a and indices[j] <= indices[j - 1]):
            return np.int64(j)
    return np.int64(-1)


@kernel()
def csr_library_size(indptr, indices, data, n_genes, library_size_b):
    """Check a CSR chunk and sum its rows; return (fault, position of the fault).

    Parameters
    ----------
    indptr, indices, data
        (b + 1,) int64, (nnz,), (nnz,); rows may be unsorted and hold duplicates.
    library_size_b
        (b,) int64 output.
    """
    for i in range(len(indptr) - 1):
        total = np.int64(0)
        for j in range(indptr[i], indptr[i + 1]):
            fault = check_entry(indices[j], data[j], n_genes, LARGEST)
            if fault != OK:
                return fault, j
            total += np.int64(data[j])
        library_size_b[i] = total
    return OK, 0


@kernel()
def csc_library_size(indices, data, library_size_n):
    """Add a CSC chunk to the (n,) int64 library sizes of all cells; return (fault, position of the fault)."""
    n = len(library_size_n)
    for j in range(len(indices)):
        i = indices[j]
        fault = check_entry(i, data[j], n, LARGEST)
        if fault != OK:
            return fault, j
        library_size_n[i] += np.int64(data[j])
    return OK, 0


@kernel()
def dense_library_size(block, library_size_b):
    """Add the row sums of a dense (b, w) block; return (fault, position of the fault in C order)."""
    for i in range(block.shape[0]):
        total = np.int64(0)
        for g in range(block.shape[1]):
            fault = check_count(block[i, g], LARGEST)
            if fault != OK:
                return fault, i * block.shape[1] + g
            total += np.int64(block[i, g])
        library_size_b[i] += total
    return OK, 0


@kernel()
def csr_normalise(indptr, indices, data, scale_b, log, unit, n_genes, out):
    """Normalise a CSR chunk; return (fault, position of the fault).

    Parameters
    ----------
    indptr, indices, data
        (b + 1,) int64, (nnz,), (nnz,); every row must be strictly increasing, or the fault is ``NOT_SORTED``.
    scale_b
        (b,) float64 from :func:`make_scale`.
    log, unit
        Whether to apply log1p, and its factor: 1 / log(base), or 1.
    out
        (nnz,) float32.
    """
    table = np.empty(TABLE, np.float32)
    small = np.empty(BLOCK, np.int32)
    for i in range(len(indptr) - 1):
        scale = scale_b[i]
        a, b = indptr[i], indptr[i + 1]
        j = _find_disorder(indices, a, b, n_genes)
        if j >= 0:
            return (BAD_INDEX if indices[j] < 0 or indices[j] >= n_genes else NOT_SORTED), j
        table[:] = -1.0
        for start in range(a, b, BLOCK):
            stop = min(start + BLOCK, b)
            part, to = data[start:stop], out[start:stop]
            _to_small(part, small)
            for j in range(len(part)):
                k = small[j]
                if k >= 0:
                    x = table[k]
                    if x < 0.0:
                        y = k * scale
                        x = np.float32(np.log1p(y) * unit if log else y)
                        table[k] = x
                    to[j] = x
                else:
                    fault = check_count(part[j], LARGEST)
                    if fault != OK:
                        return fault, start + j
                    y = part[j] * scale
                    to[j] = np.float32(np.log1p(y) * unit if log else y)
    return OK, 0


@kernel()
def make_cell_table(scale_n, log, unit, table_nt):
    """Fill (n, CELL_TABLE) float32 with the values of the counts 1, 2, … in every cell."""
    for i in range(len(scale_n)):
        for t in range(table_nt.shape[1]):
            y = (t + 1) * scale_n[i]
            table_nt[i, t] = np.float32(np.log1p(y) * unit if log else y)


@kernel()
def csc_normalise(indptr, indices, data, scale_n, table_nt, log, unit, out):
    """Normalise a CSC chunk like :func:`csr_normalise`; ``scale_n`` and ``table_nt`` cover all cells."""
    n = len(scale_n)
    n_table = table_nt.shape[1]
    for k in range(len(indptr) - 1):
        last = np.int64(-1)
        for j in range(indptr[k], indptr[k + 1]):
            i = np.int64(indices[j])
            if i < 0 or i >= n:
                return BAD_INDEX, j
            if i <= last:
                return NOT_SORTED, j
            last = i
            v = data[j]
            fault = check_count(v, LARGEST)
            if fault != OK:
                return fault, j
            t = int(v) - 1 if v <= n_table else n_table
            if t < 0:
                out[j] = 0.0
            elif t < n_table:
                out[j] = table_nt[i, t]
            else:
                y = v * scale_n[i]
                out[j] = np.float32(np.log1p(y) * unit if log else y)
    return OK, 0


@kernel()
def dense_normalise(block, scale_b, log, unit, out):
    """Normalise a dense (b, g) block into (b, g) float32; return (fault, position of the fault in C order)."""
    table = np.empty(TABLE, np.float32)
    for i in range(block.shape[0]):
        table[:] = -1.0
        table[0] = 0.0
        scale = scale_b[i]
        for g in range(block.shape[1]):
            v = block[i, g]
            fault = check_count(v, LARGEST)
            if fault != OK:
                return fault, i * block.shape[1] + g
            if v < TABLE:
                k = int(v)
                x = table[k]
                if x < 0.0:
                    y = v * scale
                    x = np.float32(np.log1p(y) * unit if log else y)
                    table[k] = x
                out[i, g] = x
            else:
                y = v * scale
                out[i, g] = np.float32(np.log1p(y) * unit if log else y)
    return OK, 0
