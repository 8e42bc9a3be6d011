"""Read loom files: a dense matrix of genes × cells, with attributes of rows (genes) and columns (cells)."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.formats.anndata import open_matrix
from vcelltools.io.hdf5.arrays import Array2D, Buffer
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.safe import File, get_node, is_group
from vcelltools.io.hdf5.table import EmptyTable, read_values
from vcelltools.io.matrix import DenseMatrix
from vcelltools.io.opened import Dataset, check_shape

_CELLS, _GENES = ("CellID", "cell_names", "obs_names", "cell_id", "Cell"), ("Gene", "gene_names", "var_names", "Genes")
_RENAMED = {"Accession": "gene_ids"}


class Turned:
    """A two-dimensional array with rows and columns exchanged."""

    def __init__(self, inner: Array2D) -> None:
        self._inner = inner
        self.shape = inner.shape[::-1]
        self.dtype, self.stored_bytes, self.filters = inner.dtype, inner.stored_bytes, inner.filters
        self.chunks = None if inner.chunks is None else inner.chunks[::-1]
        self.cold = inner.cold

    def read(self, r0: int, r1: int, c0: int, c1: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the block ``[r0:r1, c0:c1]`` as C-contiguous ``dtype``; thread-safe."""
        return np.ascontiguousarray(self._inner.read(c0, c1, r0, r1, dtype, buffer).T)


def is_loom(file: File) -> bool:
    """Return whether an open HDF5 file is a loom file."""
    return (
        isinstance(file, h5py.File)
        and all(is_group(get_node(file, k)) for k in ("row_attrs", "col_attrs"))
        and get_node(file, "matrix") is not None
    )


def open_loom(path: Path, file: File, source: FileBytes | None, layer: str | None) -> Dataset:
    """Open the main matrix or a layer of a loom file.

    Raises
    ------
    DataError
        If the layer does not exist, or the attributes do not match the matrix.
    """
    key = "matrix" if layer in (None, "X") else f"layers/{layer}"
    if get_node(file, key) is None:
        raise DataError(f"{path}: has no layer {layer!r}", hint=f"layers: {', '.join(list_layers(file)[1:]) or 'none'}")
    stored = open_matrix(file, source, key)
    if not isinstance(stored, DenseMatrix):
        raise DataError(f"{path}: {key} is not the dense matrix of a loom file")
    matrix = DenseMatrix(Turned(stored._values), where=f"{path}: {key}")
    check_shape(matrix, matrix.where)
    n, g = matrix.shape
    notes = [f"{path.name} is a loom file: its rows are genes and its columns cells"]
    obs = _read_attributes(file, "col_attrs", n, _CELLS, "cells", notes)
    var = _read_attributes(file, "row_attrs", g, _GENES, "genes", notes)
    return Dataset(
        path=path, kind="loom", modality=None, layer=layer or "X", matrix=matrix, obs=obs, var=var, notes=notes
    )  # fmt: skip


def list_layers(file: File) -> list[str]:
    """Return ``X`` and the names of the layers."""
    layers = get_node(file, "layers")
    return ["X", *(layers if is_group(layers) else ())]


def _read_attributes(file: File, root: str, n: int, usual: tuple[str, ...], what: str, notes: list[str]) -> EmptyTable:
    columns: dict[str, np.ndarray] = {}
    for key in get_node(file, root):
        node = get_node(file, f"{root}/{key}")
        if node is None or is_group(node) or len(node.shape) != 1:
            continue
        if node.shape != (n,):
            raise DataError(f"{file.filename}: {root}/{key} has {node.shape[0]:,} entries; {n:,} expected")
        columns[_RENAMED.get(key, key)] = read_values(file, f"{root}/{key}", length=n)[0]
    name = next((k for k in usual if k in columns), None)
    if name is None and what == "genes" and "gene_ids" in columns:
        index = columns["gene_ids"].astype(str).astype(object)
    elif name is None:
        notes.append(f"{root} names no {what} ({' or '.join(usual)}): they are numbered")
        index = np.array([str(i) for i in range(n)], dtype=object)
    else:
        index = columns.pop(name).astype(str).astype(object)
    return EmptyTable(index, where=f"{file.filename}: {root}", extra=columns)
