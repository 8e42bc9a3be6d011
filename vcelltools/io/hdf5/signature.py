"""Hash texts and numbers as they are stored, which is much faster than reading them through the HDF5 library.

Equal hashes mean equal values; different ones mean nothing, because values can be stored in several ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py
import numpy as np

from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.limits import reading
from vcelltools.io.hdf5.safe import Node, is_group
from vcelltools.io.hdf5.text import iterate_references

if TYPE_CHECKING:
    from xxhash import xxh3_128

_HEAP_BYTES = 4096  # the smallest heap, and the usual one
_MOST_BYTES = 64 << 20  # of the heaps, and of the values, of one dataset
_USUAL_SIZES = (8, 8)  # bytes of an address and of a length


def hash_stored(file: h5py.File, node: Node, digest: xxh3_128) -> bool:
    """Add a dataset, or a group of datasets, with its attributes; return False if it has an unusual form.

    Raises
    ------
    DataError
        If the file ends within the data.
    """
    with reading(file.filename, node.name):
        digest.update(repr(sorted((k, repr(v)) for k, v in node.attrs.items())).encode())
        if any(isinstance(v, h5py.Reference) for v in node.attrs.values()):
            return False
        if is_group(node):
            names = sorted(node)
            digest.update(repr(names).encode())
            return all(
                isinstance(node.get(k, getlink=True), h5py.HardLink)
                and not is_group(node[k])
                and hash_stored(file, node[k], digest)
                for k in names
            )
        digest.update(f"{node.shape} {node.dtype.str}".encode())
        if h5py.check_string_dtype(node.dtype) is not None and node.dtype == object:
            return _hash_texts(file, node, digest)
        if node.dtype.hasobject or node.dtype.itemsize * node.size > _MOST_BYTES:
            return False
        digest.update(np.ascontiguousarray(node[()]).data.cast("B") if node.size else b"")
        return True


def _hash_texts(file: h5py.File, dset: h5py.Dataset, digest: xxh3_128) -> bool:
    """Add strings of variable length, whose bytes are collected from the heaps of the file."""
    from vcelltools.kernels.faults import OK
    from vcelltools.kernels.heaps import gather_texts

    plist = file.id.get_create_plist()
    if plist.get_userblock() or tuple(plist.get_sizes()) != _USUAL_SIZES or 16 * dset.size > _MOST_BYTES:
        return False
    source = FileBytes(file.filename)
    try:
        parts = iterate_references(file, dset, source)
        if parts is None:
            return False
        words = np.concatenate([np.empty((0, 4), "<u4"), *(p.view("<u4").reshape(-1, 4) for p in parts)])[: dset.size]
        length, number = words[:, 0].astype(np.int64), words[:, 3].astype(np.int64)
        at = np.ascontiguousarray(words[:, 1:3]).view("<u8")[:, 0]
        heaps, heap = np.unique(at[length > 0], return_inverse=True)
        raw = _read_heaps(source, heaps.tolist())
        if raw is None or int(length.sum()) > _MOST_BYTES:
            return False
        of_text = np.full(len(words), -1, np.int64)
        of_text[length > 0] = heap.reshape(-1)
        sizes = np.array([len(r) for r in raw], np.int64)
        ends = np.cumsum(sizes)
        out = np.empty(int(length.sum()), np.uint8)
        order = np.argsort(of_text, kind="stable")
        whole = np.concatenate([np.empty(0, np.uint8), *raw])
        if (
            gather_texts(whole, ends - sizes, ends, order, of_text, number, length, np.cumsum(length) - length, out)
            != OK
        ):
            return False
        digest.update(length.data)
        digest.update(out.data)
        return True
    finally:
        source.close()


def _read_heaps(source: FileBytes, places: list[int]) -> list[np.ndarray] | None:
    """Return the bytes of each heap; None if a place holds none, or if there are too many."""
    out, left = [], _MOST_BYTES
    for at in places:
        if at > source.size - _HEAP_BYTES:
            return None
        raw = source.read(at, _HEAP_BYTES)
        size = int(raw[8:16].view("<u8")[0])
        left -= size
        if raw[:4].tobytes() != b"GCOL" or size < _HEAP_BYTES or size > source.size - at or left < 0:
            return None
        out.append(raw if size == _HEAP_BYTES else source.read(at, size))
    return out
