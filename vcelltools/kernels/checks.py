"""Checks of single entries, inlined into the kernels that read them."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, NEGATIVE, NOT_FINITE, NOT_WHOLE, OK, TOO_LARGE


@kernel(inline=True)
def check_count(value, largest):
    """Return the fault of one stored value as a count, or OK."""
    if value >= 0 and value <= largest and value == np.floor(value):
        return OK
    if not np.isfinite(value):
        return NOT_FINITE
    if value < 0:
        return NEGATIVE
    return TOO_LARGE if value > largest else NOT_WHOLE


@kernel(inline=True)
def check_entry(index, value, n_minor, largest):
    """Return the fault of one stored entry: an index outside ``0 .. n_minor - 1``, or a value that is not a count."""
    if index < 0 or index >= n_minor:
        return BAD_INDEX
    return check_count(value, largest)
