"""The naive reader: h5py whole-array reads, a Python-plain check of every rule, a dense matrix.

It shares no code with the readers. What it calls invalid must be refused by them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

from tests.fuzz import zarrs
from tests.fuzz.tenxfolder import read_folder

LARGEST = {"hvg": 2**31 - 1, "normalize": 2**53, "convert": None}  # count; None: any number will do
Check = Callable[[np.ndarray], np.ndarray]


class InvalidFileError(Exception):
    """The naive reader's reason."""


def need(condition: object, reason: str) -> None:
    """Raise unless ``condition`` holds."""
    if not condition:
        raise InvalidFileError(reason)


def read_naively(path: Path, kind: str, matrix: str, var: str, *, largest: int | None) -> tuple[np.ndarray, list[str]]:
    """Return (dense (n, g) values, gene names): int64 counts up to ``largest``, or float64 where it is None.

    Raises
    ------
    Exception
        For whatever is wrong with the file.
    """
    check = _check_numbers if largest is None else partial(_check_counts, largest)
    if kind == "zarr":
        return _read_zarr(path, matrix, var, check)
    if kind == "10x-folder":
        counts, names = read_folder(path)
        return check(counts), names
    with h5py.File(path, "r") as f:
        need(f.id.get_filesize() > 0, "empty")
        _refuse_links(f, matrix)
        counts = _read_tenx(f, matrix, check) if kind.startswith("10x") else _read_matrix(f, matrix, check)
        need(counts.shape[0] > 0 and counts.shape[1] > 0, "no cells or genes")
        names = _read_names(f, kind, var, counts.shape[1])
        kinds = f[var].get("feature_type") if kind == "10x3" else None
        if kinds is not None:  # of several kinds of features, the genes
            types = np.asarray(kinds[()]).astype("S")
            if len(np.unique(types)) > 1:
                keep = np.flatnonzero(types == b"Gene Expression")
                return counts[:, keep], [names[j] for j in keep]
        return counts, names


def lacks_modality(path: Path, matrix: str) -> bool:
    """Tell whether the modality of ``matrix`` (``mod/NAME/X``) is gone: what is left is then the file's only one."""
    if not matrix.startswith("mod/"):
        return False
    modality = matrix.rsplit("/", 1)[0]
    if path.is_dir():
        return not (path / modality).exists()
    with h5py.File(path, "r") as f:
        return modality not in f


def _refuse_links(f: h5py.File, key: str) -> None:
    at = "/"
    for part in key.split("/"):
        need(isinstance(f[at].get(part, getlink=True), h5py.HardLink), "a link")
        at = f"{at}{part}/"


def _read_array(d: object, ndim: int) -> np.ndarray:
    need(isinstance(d, h5py.Dataset), "not an array")
    need(d.shape is not None and d.ndim == ndim, "dimensions")
    need(not d.is_virtual and not d.external, "elsewhere")
    if d.chunks:
        expected = np.prod([-(-s // c) for s, c in zip(d.shape, d.chunks, strict=True)])
        need(d.id.get_num_chunks() >= expected, "chunks absent")
        for at in np.ndindex(*(-(-s // c) for s, c in zip(d.shape, d.chunks, strict=True))):
            d.id.read_direct_chunk(tuple(i * c for i, c in zip(at, d.chunks, strict=True)))  # else HDF5 reads zeros
    elif d.size and d.id.get_create_plist().get_layout() != h5py.h5d.COMPACT:
        need(d.id.get_offset() is not None, "never written")
    return np.asarray(d[()])


def _check_numbers(values: np.ndarray) -> np.ndarray:
    need(values.dtype.kind in "iufb", "not numbers")
    return values.astype(np.float64)


def _check_counts(largest: int, values: np.ndarray) -> np.ndarray:
    need(values.dtype.kind in "iuf", "not numbers")
    if values.dtype.kind == "f":
        need(np.isfinite(values).all(), "not finite")
        whole = (values == np.rint(values)).all()
        need(whole or largest == LARGEST["normalize"], "fractions")  # normalize takes fractional counts
    if values.size:
        need(values.min() >= 0 and values.max() <= largest, "negative or too large")
    return values.astype(np.int64) if values.dtype.kind != "f" or whole else values


def _read_matrix(f: h5py.File, key: str, check: Check) -> np.ndarray:
    node = f[key]
    if isinstance(node, h5py.Dataset):
        return check(_read_array(node, 2))
    encoding = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format"))
    encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    n, g = (int(s) for s in shape)
    kind = encoding.removesuffix("_matrix")
    need(kind in ("csr", "csc"), "encoding")
    parts = [_read_array(node[k], 1) for k in ("indptr", "indices", "data")]
    if kind == "csr":
        return _expand(*parts, n, g, check)
    return _expand(*parts, g, n, check).T


def _read_zarr(path: Path, matrix: str, var: str, check: Check) -> tuple[np.ndarray, list[str]]:
    for key in (matrix, var):
        for part in [path / key, *(path / key).parents]:
            need(part == path or path not in part.parents or not part.is_symlink(), "a link")
    attrs = zarrs.read_attributes(path, matrix)
    if not (path / matrix / "indptr").is_dir():
        counts = check(zarrs.read_array(path, matrix))
    else:
        n, g = (int(s) for s in attrs["shape"])
        kind = str(attrs["encoding-type"]).removesuffix("_matrix")
        need(kind in ("csr", "csc"), "encoding")
        parts = [zarrs.read_array(path, f"{matrix}/{k}") for k in ("indptr", "indices", "data")]
        counts = _expand(*parts, n, g, check) if kind == "csr" else _expand(*parts, g, n, check).T
    need(counts.ndim == 2 and min(counts.shape) > 0, "no cells or genes")
    index = zarrs.read_attributes(path, var).get("_index")
    need(index != "", "the index has no name")
    index = index or next(k for k in ("_index", "index") if (path / var / k).is_dir())
    names = zarrs.read_array(path, f"{var}/{index}")
    need(names.shape == (counts.shape[1],), "names")
    return counts, [str(v) for v in names.tolist()]


def _read_tenx(f: h5py.File, key: str, check: Check) -> np.ndarray:
    node = f[key]
    g, n = (int(s) for s in _read_array(node["shape"], 1))
    need(len(_read_array(node["barcodes"], 1)) == n, "barcodes")
    return _expand(*(_read_array(node[k], 1) for k in ("indptr", "indices", "data")), n, g, check)


def _expand(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_major: int, n_minor: int, check: Check
) -> np.ndarray:
    need(indptr.dtype.kind in "iu" and indices.dtype.kind in "iu", "positions are not integers")
    need(n_major >= 0 and n_minor >= 0 and n_major * n_minor <= 10**7, "shape")
    need(len(indptr) == n_major + 1 and len(indices) == len(data), "lengths")
    bounds = [int(v) for v in indptr]
    need(bounds[0] == 0 and bounds[-1] == len(data), "ends of indptr")
    need(all(a <= b for a, b in pairwise(bounds)), "indptr decreases")
    need(indptr.ndim == indices.ndim == data.ndim == 1, "dimensions")
    values = check(data)
    out = np.zeros((n_major, n_minor), values.dtype)
    for i in range(n_major):
        for j in range(bounds[i], bounds[i + 1]):
            at = int(indices[j])
            need(0 <= at < n_minor, "index out of range")
            out[i, at] += values[j]
    return check(out)  # sums of duplicates


def _read_names(f: h5py.File, kind: str, var: str, g: int) -> list[str]:
    node = f[var]
    if kind == "10x3":
        values = node["name"]
    elif kind == "10x2":
        values = node["gene_names"]
    elif isinstance(node, h5py.Dataset):
        records = node[()]
        names = list(records.dtype.names)
        key = next((k for k in ("index", "_index") if k in names), names[0])
        values = records[key]
    else:
        key = node.attrs.get("_index")
        need(key not in ("", b""), "the index has no name")
        key = next(k for k in ("_index", "index") if k in node) if key is None else key
        values = node[key.decode() if isinstance(key, bytes) else str(key)]
    if isinstance(values, h5py.Group):
        values = values["values"]
    values = np.asarray(values[()] if isinstance(values, h5py.Dataset) else values)
    need(values.shape == (g,), "names")
    return [_decode(v) if isinstance(v, bytes) else str(v) for v in values.tolist()]


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:  # another code page
        return name.decode("latin-1")
