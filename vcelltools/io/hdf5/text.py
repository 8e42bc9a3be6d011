"""Check the size of the text in a string column before it is read.

HDF5 stores a string of variable length as a reference of 16 bytes (length, heap address, number) into a heap, and
any number of references may point to one long text, so a file of a few megabytes can unpack to terabytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.arrays import RAW_FILTERS, RawChunks
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.limits import get_filters

FREE_BYTES = 256 << 20
MAX_RATIO = 20
_REFERENCE = np.dtype("V16")
_PIECE = 1 << 16


def check_text(file: h5py.File, dset: h5py.Dataset) -> None:
    """Raise if strings unpack to more than ``FREE_BYTES`` and more than ``MAX_RATIO`` times the size of the file.

    Raises
    ------
    DataError
        The message names the dataset and the bytes that its strings would take.
    """
    n, size = int(dset.size), int(file.id.get_filesize())
    if n * size <= FREE_BYTES:  # even if every string were as long as the file
        return
    limit = max(FREE_BYTES, MAX_RATIO * size)
    total = 0
    for n_bytes in _iterate_bytes(file, dset, size):
        total += n_bytes
        if total > limit:
            raise DataError(
                f"{file.filename}: {dset.name} unpacks to more than {limit:,} bytes of text "
                f"from a file of {size:,} bytes, which is not plausible"
            )


def _iterate_bytes(file: h5py.File, dset: h5py.Dataset, size: int) -> Iterator[int]:
    """Yield the bytes of text in consecutive pieces of the dataset."""
    source = FileBytes(file.filename)
    try:
        parts = iterate_references(file, dset, source)
        if parts is not None:
            yield from (int(p.view("<u4").reshape(-1, 4)[:, 0].sum(dtype=np.int64)) for p in parts)
            return
    finally:
        source.close()
    step = max(FREE_BYTES // size, 1) if size < FREE_BYTES // 64 else 4096
    for a in range(0, dset.size, step):  # with unusual filters, read the strings themselves, a few at a time
        yield sum(len(v) for v in dset[a : a + step])


def iterate_references(file: h5py.File, dset: h5py.Dataset, source: FileBytes) -> Iterator[np.ndarray] | None:
    """Yield the references of strings of variable length, in consecutive pieces; None if they cannot be read directly.

    A piece is (n,) of 16 bytes: length, address of the heap, number in the heap. The last chunk is padded.
    """
    if dset.chunks is not None:
        if not set(get_filters(dset)) <= RAW_FILTERS:
            return None
        chunks = RawChunks(file, dset, source, storage=_REFERENCE)
        return (chunks.unpack(k) for k in range(len(chunks.offsets)))
    offset = dset.id.get_offset()
    if offset is None:
        return None
    cuts = [(a, min(_PIECE, dset.size - a)) for a in range(0, dset.size, _PIECE)]
    return (source.read(offset + 16 * a, 16 * n).view(_REFERENCE) for a, n in cuts)
