"""Collect the texts that a file keeps in heaps (HDF5's global heaps)."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, OK

_HEADER = 16  # bytes before the first object of a heap, and before the bytes of each object
_NUMBERS = 1 << 16  # objects are numbered in 16 bits


@kernel()
def gather_texts(raw, starts, ends, order, heap, number, length, out_at, out):
    """Copy the bytes of each text to its place; return ``OK`` or ``BAD_INDEX``.

    Parameters
    ----------
    raw
        (bytes,) uint8: the heaps, one after the other. The format is in section III.E of the HDF5 file format
        specification: a header of 16 bytes, then objects, each with its number (uint16), its reference count (uint16),
        four unused bytes, its size (uint64) and its bytes, which are padded to a multiple of 8. Number 0 is free space.
    starts, ends
        (h,) int64: the first byte of each heap in ``raw``, and the byte after its last.
    order
        (n,) int64: the texts, sorted by heap.
    heap, number, length
        (n,) int64: the heap of each text (-1 for an empty text), its number there, and its bytes.
    out_at
        (n,) int64: the place of each text in ``out``.
    out
        (total,) uint8 output.
    """
    at = np.full(_NUMBERS, -1, np.int64)
    size = np.zeros(_NUMBERS, np.int64)
    owner = np.full(_NUMBERS, -1, np.int64)
    walked = np.int64(-1)
    for i in order:
        h = heap[i]
        if h < 0:
            continue
        if h != walked:
            walked = h
            p = starts[h] + _HEADER
            while p + _HEADER <= ends[h]:
                k = np.int64(raw[p]) | np.int64(raw[p + 1]) << 8
                n = np.int64(0)
                for b in range(8):
                    n |= np.int64(raw[p + 8 + b]) << (8 * b)
                if k == 0 or n < 0 or n > ends[h] - p - _HEADER:
                    break
                at[k], size[k], owner[k] = p + _HEADER, n, h
                p += _HEADER + (n + 7) // 8 * 8
        k = number[i]
        if k <= 0 or k >= _NUMBERS or owner[k] != h or length[i] > size[k]:
            return BAD_INDEX
        first, to = at[k], out_at[i]
        for b in range(length[i]):
            out[to + b] = raw[first + b]
    return OK
