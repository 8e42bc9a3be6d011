"""Looking at the values of a matrix: are they counts, are they valid, what is each cell's total?"""

from __future__ import annotations

import math

from vcelltools.kernels._jit import kernel

OK, NEGATIVE, NOT_FINITE = 0, 1, 2


@kernel()
def scan_values(data, threshold):  # pragma: no cover  compiled
    """Find the first invalid value, and whether any fractional part exceeds ``threshold``.

    Returns
    -------
    status, position, has_fraction
        Status 0, or a code and the position of the first negative or non-finite value.
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
def csr_row_sums(indptr, data, natural, out_b):  # pragma: no cover  compiled
    """Sum every row in float64; with ``natural``, of expm1 of the values."""
    for i in range(len(indptr) - 1):
        total = 0.0
        for j in range(indptr[i], indptr[i + 1]):
            total += math.expm1(data[j]) if natural else data[j]
        out_b[i] = total


@kernel()
def csc_row_sums(indices, data, natural, out_n):  # pragma: no cover  compiled
    """Add every value of some columns to its cell's total; False where an index is out of range."""
    n = len(out_n)
    for j in range(len(indices)):
        i = indices[j]
        if i < 0 or i >= n:
            return False
        out_n[i] += math.expm1(data[j]) if natural else data[j]
    return True
