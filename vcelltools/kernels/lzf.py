"""LZF, the fast compression of h5py, outside HDF5 and without its lock.

The filter of HDF5 accepts a damaged chunk that unpacks to less than its size and leaves the rest of the memory
uninitialised, so that meaningless numbers would be read. When it packs, it does not initialise its table, so that the
same values become different bytes from one run to the next. Here, the length is checked and the bytes are reproducible.

Source of the format: the description in liblzf (literal runs, and back references of 13 bits).
Oracle: h5py's filter, in ``tests/unit/test_lzf.py``.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

_LONGEST = 264  # bytes that one back reference can copy
_FARTHEST = 8192
_HASH_BITS = 14


@kernel(inline=True)
def _hash_three(values, i):
    word = (np.uint32(values[i]) << 16) | (np.uint32(values[i + 1]) << 8) | np.uint32(values[i + 2])
    return np.uint32(word * np.uint32(2654435761)) >> np.uint32(32 - _HASH_BITS)


@kernel()
def lzf_pack(values, out):
    """Compress ``values`` (uint8) into ``out`` (uint8); the result depends on nothing but ``values``.

    Returns the number of bytes written, or -1 if they do not fit into ``out``.

    Examples
    --------
    >>> values, out = np.zeros(1000, np.uint8), np.empty(1000, np.uint8)
    >>> int(lzf_pack(values, out))
    14
    """
    n, room = len(values), len(out)
    latest = np.full(1 << _HASH_BITS, -1, np.int64)  # where three bytes with this hash were last seen
    i = 0
    o = 0
    literals = 0  # the start of the bytes that no reference covers
    while True:
        length = 0
        start = -1
        if i + 2 < n:
            h = _hash_three(values, i)
            start = latest[h]
            latest[h] = i
            if start >= 0 and i - start <= _FARTHEST:
                top = min(_LONGEST, n - i)
                while length < top and values[start + length] == values[i + length]:
                    length += 1
        if length < 3 and i < n:
            i += 1
            continue
        while literals < i:  # at a reference or at the end
            run = min(32, i - literals)
            if o + 1 + run > room:
                return -1
            out[o] = run - 1
            for k in range(run):
                out[o + 1 + k] = values[literals + k]
            o += 1 + run
            literals += run
        if i >= n:
            return o
        back = i - start - 1
        code = length - 2
        if o + 2 + (code >= 7) > room:
            return -1
        out[o] = (min(code, 7) << 5) | (back >> 8)
        if code >= 7:
            o += 1
            out[o] = code - 7
        out[o + 1] = back & 255
        o += 2
        for k in range(max(i + 1, i + length - 2), min(i + length, n - 2)):
            latest[_hash_three(values, k)] = k
        i += length
        literals = i


@kernel()
def lzf_unpack(packed, out):
    """Decompress ``packed`` (uint8) into ``out`` (uint8); every read and write is bounds-checked.

    Returns the number of bytes written, or -1 if the stream is damaged or does not fit.
    """
    n_in, n_out = len(packed), len(out)
    i = 0
    o = 0
    while i < n_in:
        control = int(packed[i])
        i += 1
        if control < 32:  # a run of literals
            run = control + 1
            if i + run > n_in or o + run > n_out:
                return -1
            for k in range(run):
                out[o + k] = packed[i + k]
            i += run
            o += run
        else:  # a copy of earlier output, which may overlap itself
            length = control >> 5
            if length == 7:
                if i >= n_in:
                    return -1
                length += int(packed[i])
                i += 1
            if i >= n_in:
                return -1
            start = o - ((control & 31) << 8) - int(packed[i]) - 1
            i += 1
            length += 2
            if start < 0 or o + length > n_out:
                return -1
            for k in range(length):
                out[o + k] = out[start + k]
            o += length
    return o
