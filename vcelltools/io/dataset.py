"""Opening a data set of any supported kind: one call, validated once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from vcelltools.errors import DataError, NotCountsError
from vcelltools.io.arrays import Hdf5Array, Hdf5Dense, MemoryArray, MemoryDense
from vcelltools.io.h5table import JoinedTable, open_table, read_values
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from vcelltools.io.safe import get_node, need_dataset, open_h5, open_h5_file, read_small, reading
from vcelltools.io.table import MemoryTable, Table

if TYPE_CHECKING:
    from anndata import AnnData

RNA_NAMES = ("rna", "gex", "gene", "genes", "gene expression", "expression", "transcriptome")


@dataclass(kw_only=True)
class Dataset:
    """An open data set; a context manager.

    Attributes
    ----------
    path
        The file or folder; None for an AnnData in memory.
    kind
        ``h5ad``, ``h5mu``, ``10x-h5``, ``10x-mtx``, ``zarr`` or ``memory``.
    modality
        The modality that was opened (h5mu), or None.
    layer
        ``X``, ``raw`` or a layer's name.
    matrix
        Cells × genes.
    obs, var
        Tables of cells and genes.
    notes
        What the reader decided or repaired, for the user to see.
    source
        What was opened: the path or the AnnData, fit to be opened again.
    """

    path: Path | None
    kind: str
    modality: str | None
    layer: str
    matrix: Matrix
    obs: Table
    var: Table
    notes: list[str] = field(default_factory=list)
    source: Any = field(default=None, repr=False)
    _closers: list[Any] = field(default_factory=list, repr=False)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.matrix.shape[1]

    @property
    def label(self) -> str:
        """The path, or ``AnnData`` for one in memory."""
        return str(self.path) if self.path else "AnnData"

    def close(self) -> None:
        """Close the files behind the data set."""
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_dataset(
    source: str | os.PathLike | AnnData, *, modality: str | None = None, layer: str | None = None
) -> Dataset:
    """Open a data set and validate its structure.

    Parameters
    ----------
    source
        An h5ad, h5mu or 10x h5 file, a 10x mtx folder, a zarr store, or an AnnData in memory.
    modality
        Which modality of a MuData file; by default the one that holds the transcriptome's counts.
    layer
        ``"X"`` (default), ``"raw"`` or a layer's name.

    Raises
    ------
    DataError
        When the file is damaged, lacks what was asked for, or is none of the known kinds.
    EnvironmentFault
        When it cannot be read: permission, or a missing HDF5 filter.
    """
    if not isinstance(source, str | os.PathLike):
        return _open_memory(source, layer or "X")
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path}: is a folder that holds neither a zarr store nor a 10x matrix")
    ds = _open_file(path, modality, layer)
    ds.source = path
    return ds


def list_choices(source: str | os.PathLike | AnnData) -> list[tuple[str | None, str]]:
    """Return every (modality, layer) of a source that :func:`open_dataset` can be asked for."""
    if not isinstance(source, str | os.PathLike):
        return [(None, k) for k in ["X", *source.layers, *(["raw"] if source.raw is not None else [])]]
    path = Path(source)
    with open_h5(path) as file:
        mod = get_node(file, "mod")
        if isinstance(mod, h5py.Group):
            return [(m, k) for m in mod for k in list_matrices(file, f"mod/{m}/")]
        return [(None, k) for k in list_matrices(file)]


def _open_file(path: Path, modality: str | None, layer: str | None) -> Dataset:
    file = open_h5_file(path)
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        ds = _open_hdf5(path, file, fd, modality, layer or "X")
    except BaseException:
        file.close()
        if fd >= 0:
            os.close(fd)
        raise
    ds._closers += [lambda: os.close(fd), file.close]
    return ds


def _open_hdf5(path: Path, file: h5py.File, fd: int, modality: str | None, layer: str) -> Dataset:
    if get_node(file, "mod") is not None:
        return _open_h5mu(path, file, fd, modality, layer)
    if modality is not None:
        raise DataError(
            f"{path}: has no modalities (it is not an h5mu), so no {modality!r}", hint="leave --modality out"
        )
    matrix, obs, var = _open_anndata_group(file, fd, "", layer)
    return Dataset(path=path, kind="h5ad", modality=None, layer=layer, matrix=matrix, obs=obs, var=var)


def _open_h5mu(path: Path, file: h5py.File, fd: int, modality: str | None, layer: str) -> Dataset:
    mod = get_node(file, "mod")
    assert isinstance(mod, h5py.Group)
    names = list(mod)
    notes = []
    if not names:
        raise DataError(f"{path}: has no modalities")
    if modality is None:
        modality, note = _choose_modality(path, file, fd, names, layer)
        notes.append(note)
    if modality not in names:
        raise DataError(f"{path}: has no modality {modality!r}", hint=f"modalities: {', '.join(names) or 'none'}")
    root = f"mod/{modality}/"
    matrix, obs, var = _open_anndata_group(file, fd, root, layer)
    if get_node(file, "obs") is not None and get_node(file, f"obsmap/{modality}") is not None:
        outer_rows, _ = read_values(file, f"obsmap/{modality}")
        outer = open_table(file, "obs", len(outer_rows))
        rows = np.full(matrix.shape[0], -1, np.int64)
        present = np.flatnonzero(outer_rows > 0)
        target = outer_rows[present].astype(np.int64) - 1
        if len(target) == matrix.shape[0] and len(target) and int(target.max()) < matrix.shape[0]:
            rows[target] = present
            if not (rows < 0).any():
                obs = JoinedTable(obs, outer, rows)
    return Dataset(path=path, kind="h5mu", modality=modality, layer=layer, matrix=matrix, obs=obs, var=var, notes=notes)


def _choose_modality(path: Path, file: h5py.File, fd: int, names: list[str], layer: str) -> tuple[str, str]:
    """Choose the transcriptome by its name and by what its values look like; return it and the reason."""
    from vcelltools.io.counts import get_count_evidence

    others = f" of {', '.join(names)}" if len(names) > 1 else ""
    candidates = [m for m in names if m.lower() in RNA_NAMES] or names
    found = {}
    for m in candidates:
        if get_node(file, _get_matrix_keys(file, f"mod/{m}/", layer)[0]) is None:
            continue
        try:
            evidence = get_count_evidence(_open_anndata_group(file, fd, f"mod/{m}/", layer)[0])
        except NotCountsError:
            continue
        if evidence.is_counts:
            found[m] = evidence.describe()
    if len(candidates) == 1:
        return candidates[0], f"modality {candidates[0]!r}{others}: {found.get(candidates[0], 'by its name')}"
    if len(found) == 1:
        m, why = next(iter(found.items()))
        return m, f"modality {m!r}{others}: {why}"
    which = f"{', '.join(found)} all hold counts" if found else f"none of them holds counts in {layer}"
    raise DataError(
        f"{path}: which modality is the transcriptome? {which}", hint=f"--modality, one of: {', '.join(names)}"
    )


def _get_matrix_keys(file: h5py.File, root: str, layer: str) -> tuple[str, str]:
    """Return the keys of the matrix and of its var, for ``X``, ``raw`` or a layer's name."""
    if layer == "X":
        return f"{root}X", f"{root}var"
    if layer == "raw":
        if get_node(file, f"{root}raw/X") is None and get_node(file, f"{root}raw.X") is not None:  # anndata 0.6
            return f"{root}raw.X", f"{root}raw.var"
        return f"{root}raw/X", f"{root}raw/var"
    return f"{root}layers/{layer}", f"{root}var"


def _open_anndata_group(file: h5py.File, fd: int, root: str, layer: str):
    """Return (matrix, obs, var) of the AnnData at ``root`` (``""`` or ``"mod/<name>/"``)."""
    key, var_key = _get_matrix_keys(file, root, layer)
    if get_node(file, key) is None:
        raise DataError(
            f"{file.filename}: {key} is missing",
            hint=f"it has: {', '.join(list_matrices(file, root)) or 'no matrix'}",
        )
    matrix = open_h5_matrix(file, fd, key)
    check_shape(matrix, f"{file.filename}: {key}")
    obs = open_table(file, f"{root}obs", matrix.shape[0], uns_key=f"{root}uns")
    var = open_table(file, var_key, matrix.shape[1], uns_key=f"{root}uns")
    return matrix, obs, var


def list_matrices(file: h5py.File, root: str = "") -> list[str]:
    """Return the layers that can be asked for: ``X``, ``raw``, and the names under ``layers``."""
    out = []
    if get_node(file, f"{root}X") is not None:
        out.append("X")
    layers = get_node(file, f"{root}layers")
    if isinstance(layers, h5py.Group):
        out += list(layers)
    if get_node(file, f"{root}raw/X") is not None or get_node(file, f"{root}raw.X") is not None:
        out.append("raw")
    return out


def check_shape(matrix: Matrix, where: str) -> None:
    """Refuse a matrix without cells or without genes."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        what = "cells" if matrix.shape[0] == 0 else "genes"
        raise DataError(f"{where} has no {what} (shape {matrix.shape[0]} × {matrix.shape[1]})")


def open_h5_matrix(file: h5py.File, fd: int, key: str) -> Matrix:
    """Open the matrix at ``key``: an anndata sparse group (current or legacy attributes) or a dense dataset."""
    where = f"{file.filename}: {key}"
    node = get_node(file, key)
    with reading(file.filename, key):
        if isinstance(node, h5py.Dataset):
            if node.ndim != 2:
                raise DataError(f"{where} has {node.ndim} dimensions; 2 expected")
            return DenseMatrix(Hdf5Dense(file, node, fd), where=where)
        assert isinstance(node, h5py.Group)
        kind, shape = _sparse_attrs(node, where)
        parts = {
            k: need_dataset(
                file,
                f"{key}/{k}",
                what="a sparse matrix needs indptr, indices and data",
                hint="write the file again",
            )
            for k in ("indptr", "indices", "data")
        }
        indptr = read_small(file, parts["indptr"])
        indices = Hdf5Array(file, parts["indices"], fd)
        data = Hdf5Array(file, parts["data"], fd)
    cls = CsrMatrix if kind == "csr" else CscMatrix
    n_major = shape[0] if kind == "csr" else shape[1]
    return cls(shape=shape, n_major=n_major, indptr=indptr, indices=indices, data=data, where=where)


def _sparse_attrs(group: h5py.Group, where: str) -> tuple[str, tuple[int, int]]:
    encoding = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format"))
    encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
    kind = encoding.removesuffix("_matrix")
    if kind not in ("csr", "csc"):
        raise DataError(f"{where}: encoding {encoding!r} is not a matrix (csr_matrix, csc_matrix or a dense array)")
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2 or min(int(s) for s in shape) < 0:
        raise DataError(f"{where}: its shape attribute is missing or wrong ({shape})")
    return kind, (int(shape[0]), int(shape[1]))


def _open_memory(adata: AnnData, layer: str) -> Dataset:
    from scipy import sparse

    if layer == "raw" and adata.raw is None:
        raise DataError("AnnData: has no raw")
    if layer not in ("X", "raw") and layer not in adata.layers:
        raise DataError(f"AnnData: has no layer {layer!r}", hint=f"layers: {', '.join(adata.layers) or 'none'}")
    X = adata.raw.X if layer == "raw" else adata.X if layer == "X" else adata.layers[layer]
    var = adata.raw.var if layer == "raw" else adata.var
    matrix: Matrix
    if sparse.issparse(X):
        if X.format not in ("csr", "csc"):
            X = X.tocsr()
        cls = CsrMatrix if X.format == "csr" else CscMatrix
        matrix = cls(
            shape=X.shape,
            n_major=X.shape[0 if X.format == "csr" else 1],
            indptr=X.indptr,
            indices=MemoryArray(X.indices),
            data=MemoryArray(X.data),
            where="AnnData: X",
        )
    elif isinstance(X, np.ndarray):
        matrix = DenseMatrix(MemoryDense(X), where="AnnData: X")
    else:
        raise DataError(f"AnnData: {layer} is a {type(X).__name__}", hint="pass the path, or load it into memory")
    check_shape(matrix, f"AnnData: {layer}")
    return Dataset(
        path=None,
        source=adata,
        kind="memory",
        modality=None,
        layer=layer,
        matrix=matrix,
        obs=MemoryTable(adata.obs, where="AnnData: obs"),
        var=MemoryTable(var, where="AnnData: var"),
    )
