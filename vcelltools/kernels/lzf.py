"""Decompress LZF, the fast compression of h5py, outside HDF5: without its lock, and with a check of the length.

The filter of HDF5 accepts a damaged chunk that unpacks to less than its size and leaves the rest of the memory
uninitialised, so that meaningless numbers would be read.

Source of the format: the description in liblzf (literal runs, and back references of 13 bits).
Oracle: h5py's filter, in ``tests/unit/test_lzf.py``.
"""

from __future__ import annotations

from vcelltools.kernels._jit import kernel


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
