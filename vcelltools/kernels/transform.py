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
