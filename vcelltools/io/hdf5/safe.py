"""Open untrusted HDF5 files.

Everything that vcelltools reads from HDF5 passes through :func:`open_h5` and :func:`get_node`. They reject
external links, external raw storage and virtual datasets (each of which makes one file read another), and
convert the errors of the library to one line that names the file and the key. The same functions accept a zarr store
(:class:`vcelltools.io.formats.zarr.ZarrFile`), which follows the same rules, so that layouts of groups and
arrays are read by the same code.
"""

from __future__ import annotations

import importlib
import lzma
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.hdf5.limits import MAX_RATIO, check_filters, check_ratio, reading
from vcelltools.io.hdf5.probe import probe_h5
from vcelltools.io.hdf5.text import check_text
from vcelltools.io.textfile import say_missing

if TYPE_CHECKING:
    from vcelltools.io.formats.zarr import ZarrFile

File: TypeAlias = "h5py.File | ZarrFile"
Node: TypeAlias = Any  # h5py.Group, h5py.Dataset, zarr.Group or zarr.Array

_MAX_LINKS = 16

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "lzma"}  # first bytes -> kind of file
_FOREIGN = {b"PAR1": "a Parquet table", b"PK\x03\x04": "a zip archive", b"\x93NUMPY": "a NumPy array"}

HDF5_VERSION: str = h5py.version.hdf5_version


@contextmanager
def open_h5(path: str | os.PathLike) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises
    ------
    DataError
        If the file is missing, empty, truncated or not an HDF5 file.
    EnvironmentFault
        If permission is denied.
    """
    file = open_h5_file(path)
    try:
        yield file
    finally:
        file.close()


def open_h5_file(path: str | os.PathLike) -> h5py.File:
    """Open like :func:`open_h5`; the caller closes the file."""
    p = Path(path)
    if p.is_dir():
        raise DataError(f"{p} is a folder, not an HDF5 file")
    if not p.exists():
        raise say_missing(p)
    if not os.access(p, os.R_OK):
        raise EnvironmentFault(f"{p}: permission denied", hint="check the mode and owner of the file")
    size = p.stat().st_size
    if size == 0:
        raise DataError(f"{p}: the file is empty (0 bytes)", hint="copy or download it again")
    try:
        if not h5py.is_hdf5(p):
            what, hint = _name_content(p)
            raise DataError(f"{p}: {what}", hint=hint)
        _check_length(p, size)
        probe_h5(p)
        return h5py.File(p, "r", locking="best-effort")
    except (OSError, RuntimeError, ValueError) as e:
        text = str(e)
        if "truncated" in text:
            raise DataError(
                f"{p}: the file is truncated ({size:,} bytes on disk, fewer than its header states)",
                hint="copy or download it again",
            ) from e
        raise DataError(
            f"{p}: the file is damaged or truncated (HDF5 says: {' '.join(text.split())})",
            hint="copy or download it again",
        ) from e


def _name_content(p: Path) -> tuple[str, str]:
    """Identify a file that is not HDF5 by its first bytes; return its kind and what to do about it."""
    with p.open("rb") as f:
        head = f.read(512)
    opener = next((o for magic, o in _PACKED.items() if head.startswith(magic)), None)
    inner = head
    if opener is not None:
        try:
            with importlib.import_module(opener).open(p) as g:
                inner = g.read(512)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
            inner = b""
    if re.match(rb"(RD[XAB]\d\n)?[XAB]\n", inner):
        hint = (
            "in R: x <- readRDS(FILE); zellkonverter::writeH5AD(Seurat::as.SingleCellExperiment(x), NEW) writes an h5ad"
        )
        return "is an R object (rds or RData)", hint
    if opener is not None:
        tool = {"gzip": "gunzip", "bz2": "bunzip2", "lzma": "unxz"}[opener]
        return "a gzip-compressed file" if opener == "gzip" else f"compressed ({opener})", f"{tool} {p.name}"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            return f"is {what}", "h5ad, h5mu and 10x h5 files are HDF5"
    if b"\0" not in head and head.count(b"\n") and (head.count(b",") > 2 or head.count(b"\t") > 2):
        return "is a text table", "name it .csv, .tsv or .txt to have it read"
    return "is not an HDF5 file, or its first bytes are damaged", "h5ad, h5mu and 10x h5 files are HDF5"


def _check_length(p: Path, size: int) -> None:
    """Compare the length of the file with the one in its superblock, because HDF5 overlooks a few missing bytes.

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
            f"{p}: the file is truncated ({size:,} bytes on disk, its header states {end:,})",
            hint="copy or download it again",
        )


def _resolve(file: h5py.File, parts: list[str], hops: int) -> h5py.Group | h5py.Dataset | None:
    """Walk ``parts`` from the root, checking the class of each link before following it."""
    if hops > _MAX_LINKS:
        raise DataError(f"{file.filename}: soft links form a cycle at /{'/'.join(parts)}")
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
                f"{file.filename}: {where} is an external link to another file, which is not followed",
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
    """Return the group or array at ``key``, or None; links are checked, not trusted.

    Raises
    ------
    DataError
        If there is an external link, external raw storage or a virtual dataset on the path.
    """
    with reading(file.filename, key):
        if not isinstance(file, h5py.File):
            return file.get_node(key)
        node = _resolve(file, [p for p in key.split("/") if p], 0)
        if isinstance(node, h5py.Datatype):
            raise DataError(f"{file.filename}: {key} is a named datatype, which does not hold data")
        if isinstance(node, h5py.Dataset):
            if node.is_virtual:
                raise DataError(
                    f"{file.filename}: {key} is a virtual dataset, which reads other files; this is not allowed"
                )
            if node.external:
                raise DataError(f"{file.filename}: {key} keeps its data in another file; this is not allowed")
        return node


def need_node(file: File, key: str, *, what: str, hint: str | None = None) -> Node:
    """Return the node at ``key``, or raise a :class:`DataError` that says what is missing."""
    node = get_node(file, key)
    if node is None:
        raise DataError(f"{file.filename}: {key} is missing: {what}", hint=hint)
    return node


def need_dataset(file: File, key: str, *, what: str, hint: str | None = None) -> Node:
    """Return the array at ``key``; a group is an error."""
    node = need_node(file, key, what=what, hint=hint)
    if is_group(node):
        raise DataError(f"{file.filename}: {key} is a group where an array was expected: {what}", hint=hint)
    return node


def get_length(file: File, key: str) -> int | None:
    """Return the length of the column at ``key`` (an array, or the group of a nullable one) without reading it."""
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
    """Read a dataset, or some of its rows, in native byte order, with strings decoded.

    Parameters
    ----------
    length
        The required number of entries, checked before reading.
    ratio
        Limit on the ratio of unpacked to stored bytes.
    rows
        The rows to read; by default all.
    checked
        Names of the datasets whose text has been measured, to which this one is added, so that reading many ranges
        measures it only once.

    Raises
    ------
    DataError
        If the length is wrong, the array unpacks to far more bytes than are stored (:func:`check_ratio`), or its
        entries are neither numbers nor text.
    """
    where = f"{file.filename}: {dset.name}"
    if length is not None and tuple(dset.shape or ()) != (length,):
        raise DataError(f"{where} has {' × '.join(map(str, dset.shape or ())) or 'no'} entries instead of {length:,}")
    with reading(file.filename, dset.name):
        if not isinstance(file, h5py.File):
            return file.read_small(dset, length=length, ratio=ratio, rows=rows)
        check_ratio(where, dset.size * dset.dtype.itemsize, dset.id.get_storage_size(), ratio=ratio)
        check_filters(file.filename, dset)
        if h5py.check_string_dtype(dset.dtype) is not None:
            if dset.dtype == object and (checked is None or dset.name not in checked):
                check_text(file, dset)
                if checked is not None:
                    checked.add(dset.name)
            return _decode_texts(np.asarray(dset[() if rows is None else rows]))
        check_objects(where, dset.dtype)
        values = np.asarray(dset[() if rows is None else rows])
        if values.dtype.byteorder not in ("=", "|"):
            values = values.astype(values.dtype.newbyteorder("="))
        return values


def check_objects(where: str, dtype: np.dtype) -> None:
    """Raise if h5py reads a datatype as objects other than text: references, or arrays of different lengths."""
    if dtype.kind == "O" and h5py.check_string_dtype(dtype) is None:
        what = "references" if h5py.check_ref_dtype(dtype) is not None else "arrays of different lengths"
        raise DataError(f"{where} holds {what}, which are not supported")


def _decode_texts(raw: np.ndarray) -> np.ndarray:
    """Return bytes as str, whatever character set they are declared in: UTF-8, else Latin-1."""
    texts = raw.reshape(-1).tolist()
    out = np.empty(len(texts), object)
    for encoding in ("utf-8", "latin-1"):
        try:
            # one text decodes much faster than many; those of HDF5 end at their first NUL
            parts = b"\0".join(texts).decode(encoding).split("\0") if texts else []
            out[:] = parts if len(parts) == len(texts) else [t.decode(encoding) for t in texts]
            break
        except UnicodeDecodeError:
            continue
    return out.reshape(raw.shape)
