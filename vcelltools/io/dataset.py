"""Opening a data set of any supported kind: one call, validated once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.annfile import list_matrices, open_annotated
from vcelltools.io.arrays import MemoryArray, MemoryDense
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from vcelltools.io.opened import Dataset, check_shape
from vcelltools.io.safe import File, get_node, is_group, open_h5_file, reading
from vcelltools.io.table import MemoryTable
from vcelltools.io.tenx import find_mtx, is_tenx, list_parts, open_mtx, open_tenx
from vcelltools.io.zarrstore import ZarrFile, is_zarr

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Dataset", "list_choices", "open_dataset"]


def open_dataset(
    source: str | os.PathLike | AnnData, *, modality: str | None = None, layer: str | None = None
) -> Dataset:
    """Open a data set and validate its structure.

    Parameters
    ----------
    source
        An h5ad, h5mu or 10x h5 file, a 10x mtx folder, a zarr store, or an AnnData, in memory or backed by its file.
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
    if (mtx_fpath := find_mtx(path)) is not None:
        ds = open_mtx(path, mtx_fpath, modality, layer)
    else:
        ds = _open_known(path, modality, layer)
    ds.source = path
    return ds


def list_choices(source: str | os.PathLike | AnnData) -> list[tuple[str | None, str]]:
    """Return every (modality, layer) of a source that :func:`open_dataset` can be asked for."""
    if not isinstance(source, str | os.PathLike):
        return [(None, k) for k in ["X", *_get_layers(source), *(["raw"] if source.raw is not None else [])]]
    path = Path(source)
    if find_mtx(path) is not None:
        return [(None, "X")]
    file, close = open_container(path)
    try:
        with reading(path, "its structure"):
            if is_tenx(file):
                return [(m, "X") for m in list_parts(file)]
            mod = get_node(file, "mod")
            if is_group(mod):
                return [(m, k) for m in mod for k in list_matrices(file, f"mod/{m}/")]
            return [(None, k) for k in list_matrices(file)]
    finally:
        close()


def open_container(path: Path) -> tuple[File, Callable[[], None]]:
    """Open an HDF5 file or a zarr store; return it and what closes it."""
    if path.is_dir():
        if not is_zarr(path):
            raise DataError(
                f"{path}: is a folder that holds neither a zarr store nor a 10x matrix",
                hint="a 10x folder has matrix.mtx, barcodes.tsv and features.tsv or genes.tsv (or the same with .gz)",
            )
        store = ZarrFile(path)
        return store, store.close
    file = open_h5_file(path)
    return file, file.close


def _open_known(path: Path, modality: str | None, layer: str | None) -> Dataset:
    file, close = open_container(path)
    fd = -1
    try:
        if isinstance(file, h5py.File):
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        with reading(path, "its structure"):
            if is_tenx(file):
                ds = open_tenx(path, file, fd, modality, layer)
            else:
                ds = open_annotated(path, file, fd, modality, layer or "X")
    except BaseException:
        close()
        if fd >= 0:
            os.close(fd)
        raise
    if fd >= 0:
        ds._closers.append(lambda: os.close(fd))
    ds._closers.append(close)
    return ds


def _open_backed(adata: AnnData) -> Dataset:
    """Open an AnnData whose X is still on the disk: the file's matrix, with obs and var as they are in memory."""
    ds = open_dataset(str(adata.filename), layer="X")
    if ds.matrix.shape != adata.shape:
        ds.close()
        raise DataError(
            f"{adata.filename}: holds {ds.matrix.shape[0]:,} × {ds.matrix.shape[1]:,}, the AnnData on it "
            f"{adata.shape[0]:,} × {adata.shape[1]:,}",
            hint="open it again",
        )
    ds.source = adata
    ds.obs, ds.var = MemoryTable(adata.obs, where="AnnData: obs"), MemoryTable(adata.var, where="AnnData: var")
    return ds


def _get_layers(adata: AnnData) -> list[str]:
    """Return the names of the layers; anndata 0.13 has X among them, under None."""
    return [k for k in adata.layers if k is not None]


def _open_memory(adata: AnnData, layer: str) -> Dataset:
    from scipy import sparse

    if not all(hasattr(adata, part) for part in ("X", "obs", "var", "layers", "raw")):
        raise UsageError(f"a {type(adata).__name__} is no data set", hint="give a path or an AnnData")
    if layer == "X" and getattr(adata, "isbacked", False) and not adata.is_view:
        return _open_backed(adata)
    if layer == "raw" and adata.raw is None:
        raise DataError("AnnData: has no raw")
    layers = _get_layers(adata)
    if layer not in ("X", "raw", *layers):
        raise DataError(f"AnnData: has no layer {layer!r}", hint=f"layers: {', '.join(layers) or 'none'}")
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
