"""CRC-32C (Castagnoli), the checksum that Google Cloud Storage stores for every object."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

_POLYNOMIAL = 0x82F63B78  # reflected


def _make_tables() -> np.ndarray:
    """(8, 256) uint32: tables[k][b] advances byte b by k more zero bytes."""
    tables = np.zeros((8, 256), np.uint32)
    for b in range(256):
        crc = b
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        tables[0, b] = crc
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0, tables[k - 1] & 0xFF]
    return tables


TABLES = _make_tables()


@kernel()
def crc32c(data, crc, tables):
    """Return the checksum ``crc`` (0 at first) updated with the bytes ``data``, eight bytes at a time.

    Parameters
    ----------
    data
        (n,) uint8.
    crc
        uint32.
    tables
        (8, 256) uint32, ``TABLES``.
    """
    c = np.uint32(crc) ^ np.uint32(0xFFFFFFFF)
    n = len(data)
    whole = n - n % 8
    for i in range(0, whole, 8):
        low = (
            c
            ^ np.uint32(data[i])
            ^ (np.uint32(data[i + 1]) << np.uint32(8))
            ^ (np.uint32(data[i + 2]) << np.uint32(16))
            ^ (np.uint32(data[i + 3]) << np.uint32(24))
        )
        c = (
            tables[7, low & np.uint32(0xFF)]
            ^ tables[6, (low >> np.uint32(8)) & np.uint32(0xFF)]
            ^ tables[5, (low >> np.uint32(16)) & np.uint32(0xFF)]
            ^ tables[4, low >> np.uint32(24)]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
    for i in range(whole, n):
        c = tables[0, (c ^ np.uint32(data[i])) & np.uint32(0xFF)] ^ (c >> np.uint32(8))
    return c ^ np.uint32(0xFFFFFFFF)
