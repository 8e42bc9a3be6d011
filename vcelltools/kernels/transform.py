"""Element-wise functions in the precision of their input."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def expm1_flat(x, out):  # pragma: no cover  compiled
    """Write expm1 of ``x`` to ``out``: the C library's, in single precision for float32.

    numpy's vectorised one may differ in the last place, which decides the sign of a fold change near zero.
    """
    for i in range(len(x)):
        out[i] = np.expm1(x[i])
