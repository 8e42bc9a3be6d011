"""The faults that kernels report about their input.

A kernel never raises. It returns a fault, or writes it to an output, with its position;
:func:`vcelltools.io.faults.make_error` converts both to an error that names the cell and the gene.
"""

from __future__ import annotations

from enum import IntEnum


class Fault(IntEnum):
    """A fault, or OK."""

    OK = 0
    """Nothing."""
    BAD_INDEX = 1
    """An index is outside the matrix."""
    NOT_FINITE = 2
    """A value is NaN or infinite."""
    NEGATIVE = 3
    """A value is below zero."""
    NOT_WHOLE = 4
    """A value is not a whole number."""
    TOO_LARGE = 5
    """A count, or the sum of duplicate entries, exceeds the largest supported count."""
    DUPLICATE = 6
    """A position has several entries."""
    NOT_SORTED = 7
    """The indices of a row or column do not strictly increase, although they must."""
    FULL = 8
    """The output, or a list that belongs to it, is full."""


# as plain integers, which compile to constants
OK, BAD_INDEX, NOT_FINITE, NEGATIVE, NOT_WHOLE, TOO_LARGE, DUPLICATE, NOT_SORTED, FULL = (int(f) for f in Fault)

MAX_COUNT = 2_147_483_647
"""The largest count of one cell and gene."""

FAULT, POSITION, N_OVER, N_DUPLICATES, N_UNSORTED, STAMP = range(6)
STATE_SIZE = 6
"""Length of the ``state`` of a resumable kernel: the fault and its position in the values of the chunk; the numbers of
entries in the overflow list, of summed duplicates, and of unsorted rows or columns; and a counter that gives every
unsorted row a unique stamp in the search for duplicates."""
