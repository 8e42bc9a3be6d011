"""Opening files that nobody vouches for.

Everything that vcelltools reads from HDF5 passes through :func:`open_h5` and :func:`get_node`. They refuse
external links, external raw storage and virtual datasets (each of which makes one file read another), and
turn the library's errors into one line that names the file and the key. The same functions take a zarr store
(:class:`vcelltools.io.zarrstore.ZarrFile`), which keeps the same rules, so that the layouts built of groups and
arrays are read by one piece of code.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np

from vcelltools.errors import DataError, EnvironmentFault, VcellError
from vcelltools.io.probe import probe_h5
from vcelltools.textfile import say_missing

if TYPE_CHECKING:
    from vcelltools.io.zarrstore import ZarrFile

File: TypeAlias = "h5py.File | ZarrFile"
Node: TypeAlias = Any  # h5py.Group, h5py.Dataset, zarr.Group or zarr.Array

# Small arrays (an obs column, indptr) are read whole. A dataset that unpacks to more than SMALL_BYTES and to
# more than MAX_RATIO times what it occupies on disk is a decompression bomb, not a column.
SMALL_BYTES = 64 << 20
MAX_RATIO = 100
# A column is as long as the matrix, which is known by then, and a constant one packs a thousandfold.
COLUMN_RATIO = 100_000
# A matrix is streamed, so that its size does not matter, but a few megabytes that stand for hours of zeros do.
STREAM_BYTES, STREAM_RATIO = 1 << 30, 500
_MAX_LINKS = 16

# HDF5 filter id -> (name, what installs it)
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


HDF5_VERSION: str = h5py.version.hdf5_version


@contextmanager
def reading(path: str | os.PathLike, key: str = "/") -> Iterator[None]:
    """Turn whatever HDF5 raises inside the block into a :class:`DataError` that names file and key."""
    try:
        yield
    except VcellError:
        raise
    except PermissionError as e:
        raise EnvironmentFault(f"{path}: permission denied", hint="check the file's mode and owner") from e
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, UnicodeError, OverflowError, MemoryError) as e:
        text = " ".join(str(e).split())
        raise DataError(f"{path}: cannot read {key}: {text or type(e).__name__}") from e


@contextmanager
def open_h5(path: str | os.PathLike) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises
    ------
    DataError
        When the file is missing, empty, truncated or not HDF5.
    EnvironmentFault
        When permission is denied.
    """
    file = open_h5_file(path)
    try:
        yield file
    finally:
        file.close()


def open_h5_file(path: str | os.PathLike) -> h5py.File:
    """Open as :func:`open_h5` does; the caller closes."""
    p = Path(path)
    if p.is_dir():
        raise DataError(f"{p}: is a folder, not an HDF5 file")
    if not p.exists():
        raise say_missing(p)
    if not os.access(p, os.R_OK):
        raise EnvironmentFault(f"{p}: permission denied", hint="check the file's mode and owner")
    size = p.stat().st_size
    if size == 0:
        raise DataError(f"{p}: the file is empty (0 bytes)", hint="copy or download it again")
    try:
        if not h5py.is_hdf5(p):
            with p.open("rb") as f:
                zipped = f.read(2) == b"\x1f\x8b"
            raise DataError(
                f"{p}: {'gzipped as a whole' if zipped else 'not an HDF5 file, or its first bytes are damaged'}",
                hint=f"gunzip {p.name}" if zipped else "h5ad, h5mu and 10x h5 files are HDF5",
            )
        _check_length(p, size)
        probe_h5(p)
        return h5py.File(p, "r", locking="best-effort")
    except (OSError, RuntimeError, ValueError) as e:
        text = str(e)
        if "truncated" in text:
            raise DataError(
                f"{p}: the file is truncated ({size:,} bytes on disk, its header promises more)",
                hint="copy or download it again",
            ) from e
        raise DataError(
            f"{p}: the file is damaged or truncated (HDF5 says: {' '.join(text.split())})",
            hint="copy or download it again",
        ) from e


def _check_length(p: Path, size: int) -> None:
    """Compare the file's length with the one in its superblock; HDF5 overlooks a few missing bytes.

    Layout of the superblock: HDF5 File Format Specification, section II.A.
    """
    with p.open("rb") as f:
        at = 0
        while at < size:
            f.seek(at)
            head = f.read(48)
            if head[:8] == b"\x89HDF\r\n\x1a\n":
                break
            at = max(512, 2 * at)
    if len(head) < 48 or at >= size:
        return
    width = head[13] if head[8] < 2 else head[9]
    if width != 8:
        return
    end = struct.unpack_from("<Q", head, 40 if head[8] == 0 else 28)[0]
    if head[8] == 1 or end == 0xFFFFFFFFFFFFFFFF:
        return
    if size < end:
        raise DataError(
            f"{p}: the file is truncated ({size:,} bytes on disk, its header promises {end:,})",
            hint="copy or download it again",
        )


def _resolve(file: h5py.File, parts: list[str], hops: int) -> h5py.Group | h5py.Dataset | None:
    """Walk ``parts`` from the root, looking at each link's class before following it."""
    if hops > _MAX_LINKS:
        raise DataError(f"{file.filename}: soft links go round in circles at /{'/'.join(parts)}")
    node: h5py.Group | h5py.Dataset = file["/"]
    for i, part in enumerate(parts):
        if not isinstance(node, h5py.Group):
            return None
        link = node.get(part, getlink=True)
        if link is None:
            return None
        where = "/" + "/".join(parts[: i + 1])
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"{file.filename}: {where} is an external link to another file; it is not followed",
                hint="copy the linked data into the file first",
            )
        if isinstance(link, h5py.SoftLink):
            target = link.path if link.path.startswith("/") else f"{node.name}/{link.path}"
            rest = [q for q in target.split("/") if q and q != "."] + parts[i + 1 :]
            return _resolve(file, rest, hops + 1)
        node = node[part]
    return node


def is_group(node: Node) -> bool:
    """Return whether ``node`` is a group (of HDF5 or zarr), not an array and not None."""
    return hasattr(node, "keys")


def get_node(file: File, key: str) -> Node:
    """Return the group or array at ``key``, or None where there is none; links are checked, not trusted.

    Raises
    ------
    DataError
        For an external link, external raw storage or a virtual dataset anywhere on the way.
    """
    with reading(file.filename, key):
        if not isinstance(file, h5py.File):
            return file.get_node(key)
        node = _resolve(file, [p for p in key.split("/") if p], 0)
        if isinstance(node, h5py.Dataset):
            if node.is_virtual:
                raise DataError(f"{file.filename}: {key} is a virtual dataset (it reads other files); refused")
            if node.external:
                raise DataError(f"{file.filename}: {key} keeps its data in another file; refused")
        return node


def need_node(file: File, key: str, *, what: str, hint: str | None = None) -> Node:
    """Return the node at ``key`` or raise a :class:`DataError` that says what is missing."""
    node = get_node(file, key)
    if node is None:
        raise DataError(f"{file.filename}: {key} is missing: {what}", hint=hint)
    return node


def need_dataset(file: File, key: str, *, what: str, hint: str | None = None) -> Node:
    """Return the array at ``key``; a group in its place is an error too."""
    node = need_node(file, key, what=what, hint=hint)
    if is_group(node):
        raise DataError(f"{file.filename}: {key} is a group where an array was expected: {what}", hint=hint)
    return node


def check_ratio(where: str, declared: int, stored: int, *, free: int = SMALL_BYTES, ratio: int = MAX_RATIO) -> None:
    """Refuse an array that declares more than ``free`` bytes and more than ``ratio`` times what is stored."""
    if declared > free and declared > ratio * max(stored, 1):
        raise DataError(f"{where} declares {declared:,} bytes but only {stored:,} are stored; refused")


def get_length(file: File, key: str) -> int | None:
    """Return the length of the column at ``key`` (an array, or a group of a nullable one), without reading it."""
    node = get_node(file, key)
    if is_group(node):
        node = get_node(file, f"{key}/values")
    shape = getattr(node, "shape", None)
    return int(shape[0]) if shape and not is_group(node) else None


def read_small(
    file: File,
    dset: Node,
    *,
    length: int | None = None,
    ratio: int = MAX_RATIO,
    rows: slice | None = None,
    checked: set[str] | None = None,
) -> np.ndarray:
    """Read a dataset (all of it, or some rows) into native byte order (strings decoded).

    Parameters
    ----------
    length
        The number of entries that there must be; anything else is refused before it is read.
    ratio
        How many times its stored bytes it may unpack to.
    rows
        The rows to read; all by default.
    checked
        Names of the datasets whose text was measured already; this one's is added. Reading range after range
        measures it once.

    Raises
    ------
    DataError
        When the length is wrong, or the array unpacks to far more than is stored (:func:`check_ratio`).
    """
    where = f"{file.filename}: {dset.name}"
    if length is not None and tuple(dset.shape or ()) != (length,):
        raise DataError(f"{where} has {' × '.join(map(str, dset.shape or ())) or 'no'} entries; {length:,} expected")
    with reading(file.filename, dset.name):
        if not isinstance(file, h5py.File):
            return file.read_small(dset, ratio=ratio, rows=rows)
        check_ratio(where, dset.size * dset.dtype.itemsize, dset.id.get_storage_size(), ratio=ratio)
        check_filters(file.filename, dset)
        if h5py.check_string_dtype(dset.dtype) is not None:
            if dset.dtype == object and (checked is None or dset.name not in checked):
                from vcelltools.io.text import check_text

                check_text(file, dset)
                if checked is not None:
                    checked.add(dset.name)
            return np.asarray(dset.asstr()[() if rows is None else rows], dtype=object)
        values = np.asarray(dset[() if rows is None else rows])
        if values.dtype.byteorder not in ("=", "|"):
            values = values.astype(values.dtype.newbyteorder("="))
        return values


def get_filters(dset: h5py.Dataset) -> list[int]:
    """Return the HDF5 filter ids of a dataset, in the order in which they were applied."""
    plist = dset.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def list_filters() -> dict[str, bool]:
    """Return the filters by name, and whether data packed with them can be read here."""
    _load_plugins()
    return {name: bool(h5py.h5z.filter_avail(number)) for number, name in FILTER_NAMES.items()}


def _load_plugins() -> None:
    try:
        import hdf5plugin  # noqa: F401  registers its filters on import
    except ImportError:
        pass


def check_filters(path: str | os.PathLike, dset: h5py.Dataset) -> None:
    """Raise an :class:`EnvironmentFault` that names the filter where one of the dataset's is not available."""
    for fid in get_filters(dset):
        if not h5py.h5z.filter_avail(fid):
            _load_plugins()
        if not h5py.h5z.filter_avail(fid):
            name = FILTER_NAMES.get(fid, "unknown")
            raise EnvironmentFault(
                f"{path}: {dset.name} is compressed with the HDF5 filter {name} ({fid}), which is not installed",
                hint="pip install hdf5plugin",
            )
