"""Limits for all readers of HDF5 and zarr: the unpacked size of arrays, their filters, and clear errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import h5py

from vcelltools.errors import DataError, EnvironmentFault, VcellError

# Small arrays (an obs column, indptr) are read at once. A dataset that unpacks to more than SMALL_BYTES and to
# more than MAX_RATIO times what it occupies on disk is a decompression bomb, not a column.
SMALL_BYTES = 64 << 20
MAX_RATIO = 100
# A column is as long as the matrix, which is known by then, and a constant one compresses a thousandfold.
COLUMN_RATIO = 100_000
# A matrix is streamed, so its size does not matter, but a few megabytes must not unpack to hours of zeros.
STREAM_BYTES, STREAM_RATIO = 1 << 30, 500
# HDF5 filter id -> (name, package that installs it)
FILTER_NAMES = {
    1: "gzip",
    2: "shuffle",
    3: "fletcher32",
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32026: "blosc2",
}


@contextmanager
def reading(path: str | os.PathLike, key: str = "/") -> Iterator[None]:
    """Convert exceptions of HDF5 inside the block to a :class:`DataError` that names file and key."""
    try:
        yield
    except VcellError:
        raise
    except PermissionError as e:
        raise EnvironmentFault(f"{path}: permission denied", hint="check the mode and owner of the file") from e
    except MemoryError as e:
        raise EnvironmentFault(f"{path}: not enough memory to read {key}", hint="use a machine with more memory") from e
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, UnicodeError, OverflowError) as e:
        text = " ".join(str(e).split())
        raise DataError(f"{path}: cannot read {key}: {text or type(e).__name__}") from e


def check_ratio(where: str, declared: int, stored: int, *, free: int = SMALL_BYTES, ratio: int = MAX_RATIO) -> None:
    """Raise if an array declares more than ``free`` bytes and more than ``ratio`` times its stored bytes."""
    if declared > free and declared > ratio * max(stored, 1):
        raise DataError(f"{where} declares {declared:,} bytes but stores only {stored:,}, which is not plausible")


def get_filters(dset: h5py.Dataset) -> list[int]:
    """Return the HDF5 filter ids of a dataset, in the order in which they were applied."""
    plist = dset.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def list_filters() -> dict[str, bool]:
    """Return the filters by name, and whether data compressed with them can be read."""
    _load_plugins()
    return {name: bool(h5py.h5z.filter_avail(number)) for number, name in FILTER_NAMES.items()}


def _load_plugins() -> None:
    try:
        import hdf5plugin  # noqa: F401  registers its filters on import
    except ImportError:
        pass


def check_filters(path: str | os.PathLike, dset: h5py.Dataset) -> None:
    """Raise an :class:`EnvironmentFault` if a filter of the dataset is not available."""
    for fid in get_filters(dset):
        if not h5py.h5z.filter_avail(fid):
            _load_plugins()
        if not h5py.h5z.filter_avail(fid):
            name = FILTER_NAMES.get(fid, "unknown")
            raise EnvironmentFault(
                f"{path}: {dset.name} is compressed with the HDF5 filter {name} ({fid}), which is not installed",
                hint="pip install hdf5plugin",
            )
