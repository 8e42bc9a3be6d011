"""Element-wise functions in the precision of their input."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def expm1_flat(x, out):
    """Write expm1 of ``x`` to ``out``, as computed by the C library, in single precision for float32.

    numpy's vectorised function may differ in the last digit, which decides the sign of a fold change near zero.
    """
    for i in range(len(x)):
        out[i] = np.expm1(x[i])


LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
"""The natural logarithm of 2 in two parts; a product of the first with a small integer is exact."""


@kernel(fastmath={"contract"})
def expm1_small(values, n, bits, powers, out):
    """Write expm1 of the first ``n`` values, each from 0 to 700, to ``out`` (float64).

    With x = k·log(2) + r, expm1(x) = 2^k·expm1(r) + (2^k − 1), and expm1(r) is its Taylor series. The error is at most
    two units in the last place (measured with exact arithmetic). There are no branches and calls, so that the loops
    vectorise; ``math.expm1`` takes nine times as long.

    Parameters
    ----------
    values, out
        Two arrays of at least ``n`` entries.
    bits, powers
        Scratch of that length: int64, and the same memory as float64.
    """
    for i in range(n):
        x = np.float64(values[i])
        k = np.int64(x * (1 / 0.6931471805599453) + 0.5)
        bits[i] = (k + np.int64(1023)) << np.int64(52)  # 2^k
        r = (x - np.float64(k) * LN2_HIGH) - np.float64(k) * LN2_LOW
        q = 1 / 39916800 + r * (1 / 479001600 + r * (1 / 6227020800))
        q = 1 / 40320 + r * (1 / 362880 + r * (1 / 3628800 + r * q))
        q = 1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * q))
        q = 1 / 2 + r * (1 / 6 + r * (1 / 24 + r * q))
        out[i] = r + r * r * q
    for i in range(n):
        out[i] = powers[i] * out[i] + (powers[i] - 1.0)
