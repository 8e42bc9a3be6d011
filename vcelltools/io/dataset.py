"""Open a data set of any supported kind with one call that validates it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.features import choose_features
from vcelltools.io.formats.anndata import list_matrices, open_annotated
from vcelltools.io.formats.batchfile import is_batch, open_batch
from vcelltools.io.formats.loom import is_loom, list_layers, open_loom
from vcelltools.io.formats.tenx import find_mtx, is_tenx, list_parts, open_mtx, open_tenx
from vcelltools.io.formats.texttable import is_text, open_text
from vcelltools.io.formats.zarr import ZarrFile, is_zarr
from vcelltools.io.hdf5.arrays import MemoryArray, MemoryDense
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.limits import reading
from vcelltools.io.hdf5.safe import File, get_node, is_group, open_h5_file
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from vcelltools.io.opened import Dataset, check_shape
from vcelltools.io.table import MemoryTable

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Dataset", "list_choices", "open_dataset"]


def open_dataset(
    source: str | os.PathLike | AnnData | Dataset,
    *,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    library_size: str | None = None,
    name: str | None = None,
) -> Dataset:
    """Open a data set and validate its structure.

    Parameters
    ----------
    source
        An h5ad, h5mu, 10x h5, loom or batch file, a CSV or TSV, a 10x mtx folder, a zarr store; an AnnData, in memory
        or backed by its file; or a data set that is open already, which is returned as it is.
    modality
        The modality of a MuData file; by default, the one that holds the counts of the transcriptome. For any other
        kind, a short form of ``feature_type`` or ``genome``.
    layer
        ``"X"`` (default), ``"raw"`` or the name of a layer.
    feature_type
        The type of the features to use as genes (``Antibody Capture``, ...) or ``all``; by default, ``Gene Expression``
        if var distinguishes several types of Cell Ranger. In a MuData file it also chooses the modality.
    genome
        The genome of the features to use, or ``all``; by default, those of all genomes. A 10x file of version 2 has a
        matrix for each genome, one of which must be chosen.
    library_size
        The obs column of library sizes by which a command that normalises counts divides them; by default, it divides
        by their sum (:mod:`vcelltools.io.library`).
    name
        What messages call an AnnData in memory when a command reads several; a file goes by its path.

    Raises
    ------
    DataError
        If the file is damaged, lacks what was requested, or is of an unknown kind.
    EnvironmentFault
        If it cannot be read because of permissions or a missing HDF5 filter.
    """
    if isinstance(source, Dataset):
        return source
    ds = _open(source, modality, layer, feature_type, genome, name)
    ds.obs.notes, ds.library_col = ds.notes, library_size
    try:
        choose_features(ds, modality if ds.modality is None else None, feature_type, None if ds.genome else genome)
    except BaseException:
        ds.close()
        raise
    return ds


def _open(
    source: str | os.PathLike | AnnData,
    modality: str | None,
    layer: str | None,
    feature_type: str | None,
    genome: str | None,
    name: str | None,
) -> Dataset:
    if not isinstance(source, str | os.PathLike):
        return _open_memory(source, layer or "X", "AnnData" if name is None else f"AnnData ({name})")
    path = Path(source)
    if (mtx_fpath := find_mtx(path)) is not None:
        ds = open_mtx(path, mtx_fpath, layer)
    elif is_text(path):
        ds = open_text(path, layer)
    else:
        ds = _open_known(path, modality, layer, feature_type, genome)
    ds.source = path
    return ds


def list_choices(source: str | os.PathLike | AnnData) -> list[tuple[str | None, str]]:
    """Return every (modality, layer) of a source that :func:`open_dataset` can open."""
    if not isinstance(source, str | os.PathLike):
        return [(None, k) for k in ["X", *_get_layers(source), *(["raw"] if source.raw is not None else [])]]
    path = Path(source)
    if find_mtx(path) is not None or is_text(path):
        return [(None, "X")]
    file, close = open_container(path)
    try:
        with reading(path, "its structure"):
            if is_tenx(file):
                return [(m, "X") for m in list_parts(file)]
            if is_loom(file):
                return [(None, k) for k in list_layers(file)]
            mod = get_node(file, "mod")
            if is_group(mod):
                return [(m, k) for m in mod for k in list_matrices(file, f"mod/{m}/")]
            return [(None, k) for k in list_matrices(file)]
    finally:
        close()


def open_container(path: Path) -> tuple[File, Callable[[], None]]:
    """Open an HDF5 file or a zarr store; return it and the object that closes it."""
    if path.is_dir():
        if not is_zarr(path):
            raise DataError(
                f"{path} is a folder that holds neither a zarr store nor a 10x matrix",
                hint="a 10x folder has matrix.mtx, barcodes.tsv and features.tsv or genes.tsv (optionally with .gz)",
            )
        store = ZarrFile(path)
        return store, store.close
    file = open_h5_file(path)
    try:
        _refuse_foreign(path, file)
    except BaseException:
        file.close()
        raise
    return file, file.close


def _refuse_foreign(path: Path, file: File) -> None:
    """Recognise the HDF5 files of other programs by their content."""
    with reading(path, "its structure"):
        if is_group(get_node(file, "assays")) and get_node(file, "cell.names") is not None:
            raise DataError(
                f"{path} is an h5Seurat file", hint="in R: SeuratDisk::Convert(FILE, dest = 'h5ad') writes an h5ad"
            )


def _open_known(
    path: Path, modality: str | None, layer: str | None, feature_type: str | None, genome: str | None
) -> Dataset:
    file, close = open_container(path)
    source: FileBytes | None = None
    try:
        if isinstance(file, h5py.File):
            source = FileBytes(path)
        with reading(path, "its structure"):
            if is_tenx(file):
                ds = open_tenx(path, file, source, modality, layer, genome)
            elif is_loom(file):
                ds = open_loom(path, file, source, layer)
            elif modality is None and layer in (None, "X") and is_batch(file):
                ds = open_batch(path, file, source)
            else:
                ds = open_annotated(path, file, source, modality, layer or "X", feature_type)
    except BaseException:
        close()
        if source is not None:
            source.close()
        raise
    if source is not None:
        ds.file_bytes = source
        ds._closers.append(source.close)
    ds._closers.append(close)
    return ds


def _open_backed(adata: AnnData) -> Dataset:
    """Open an AnnData whose X is on disk: the matrix of the file, with obs and var from memory."""
    ds = _open(str(adata.filename), None, "X", None, None, None)
    if ds.matrix.shape != adata.shape:
        ds.close()
        raise DataError(
            f"{adata.filename} holds {ds.matrix.shape[0]:,} × {ds.matrix.shape[1]:,}, the AnnData on it "
            f"{adata.shape[0]:,} × {adata.shape[1]:,}",
            hint="open it again",
        )
    ds.source = adata
    ds.obs, ds.var = MemoryTable(adata.obs, where="AnnData: obs"), MemoryTable(adata.var, where="AnnData: var")
    return ds


def _get_layers(adata: AnnData) -> list[str]:
    """Return the names of the layers; anndata 0.13 includes X, under None."""
    return [k for k in adata.layers if k is not None]


def _open_memory(adata: AnnData, layer: str, name: str) -> Dataset:
    from scipy import sparse

    if not all(hasattr(adata, part) for part in ("X", "obs", "var", "layers", "raw")):
        raise UsageError(f"a {type(adata).__name__} is not a data set", hint="give a path or an AnnData")
    if layer == "X" and getattr(adata, "isbacked", False) and not adata.is_view:
        return _open_backed(adata)
    if layer == "raw" and adata.raw is None:
        raise DataError(f"the {name} has no raw")
    layers = _get_layers(adata)
    if layer not in ("X", "raw", *layers):
        raise DataError(f"the {name} has no layer {layer!r}", hint=f"layers: {', '.join(layers) or 'none'}")
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
            where=f"{name}: X",
        )
    elif isinstance(X, np.ndarray):
        matrix = DenseMatrix(MemoryDense(X), where=f"{name}: X")
    else:
        raise DataError(f"{name}: {layer} is a {type(X).__name__}", hint="pass the path, or load it into memory")
    check_shape(matrix, f"{name}: {layer}")
    return Dataset(
        path=None,
        source=adata,
        kind="memory",
        modality=None,
        layer=layer,
        matrix=matrix,
        obs=MemoryTable(adata.obs, where=f"{name}: obs"),
        var=MemoryTable(var, where=f"{name}: var"),
        name=name,
        stated_base=_get_stated_base(adata),
    )


def _get_stated_base(adata: AnnData) -> float | None:
    said = adata.uns.get("log1p")
    base = said.get("base") if isinstance(said, Mapping) else None
    return float(base) if isinstance(base, int | float | np.number) else None
