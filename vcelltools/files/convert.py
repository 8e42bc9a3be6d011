"""``convert`` and ``sample``: stream any readable file, or some of its cells, to a new h5ad."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.files.chosen_cells import choose_rows, find_allowed
from vcelltools.files.relayout import Change, copy_chunk, rewrite_matrix
from vcelltools.files.thinning import make_thinning
from vcelltools.io import Dataset, Table, open_dataset
from vcelltools.io.dataset import list_choices
from vcelltools.io.matrix import Matrix
from vcelltools.io.results import Result
from vcelltools.io.write.extras import carry_extras
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.io.write.h5ad import LAYOUTS, H5adWriter, get_storable, get_value_dtype
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Result):
    """The file that was written.

    Attributes
    ----------
    out
        The new h5ad.
    n_cells, n_genes, nnz
        Its shape, and the number of stored values (None if dense).
    layout, dtype, layers
        The storage of X, and the layers that were copied.
    groups
        Number of cells per group, if cells were sampled by a column.
    seconds
        Wall time.
    notes, warnings
        Decisions of the reader, and messages for the user.
    """

    out: Path
    n_cells: int
    n_genes: int
    nnz: int | None
    layout: str
    dtype: str
    layers: tuple[str, ...]
    seconds: float
    groups: dict[str, int] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@checked
def convert(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    layers: Sequence[str] = (),
    layout: str | None = None,
    dtype: str | None = None,
    index_dtype: str | None = None,
    compression: str | None = None,
    level: int | None = None,
    chunk_len: int | None = None,
    contiguous: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Write any readable matrix with its obs and var as an h5ad, in bounded memory.

    Parameters
    ----------
    source
        Any file or folder that :func:`vcelltools.io.open_dataset` opens, or an AnnData.
    modality, layer
        The matrix that becomes X.
    layers
        Additional layers to copy; ``["all"]`` copies all of them.
    layout, dtype, index_dtype
        Storage of the new X and layers; unchanged by default. Values that a dtype cannot hold are an error.
    compression, level, chunk_len, contiguous
        As in :class:`vcelltools.io.write.h5ad.H5adWriter`.

    Raises
    ------
    UsageError
        If the output exists and ``force`` is off, or options are invalid.
    DataError
        If the source is damaged, or a value does not fit.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.convert("atlas.h5ad", "dense.h5ad", layout="dense").layout
    'dense'
    """
    storage = {
        "layout": layout,
        "dtype": dtype,
        "index_dtype": index_dtype,
        "chunk_len": chunk_len,
        "contiguous": contiguous,
    }
    if contiguous and chunk_len is not None:
        raise UsageError(
            "a contiguous matrix has no chunks", hint=f"leave {spell('chunk_len')} or {spell('contiguous')} out"
        )
    packing = {"compression": compression, "level": level, "force": force}
    with open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as ds:
        return copy_cells(ds, out, [source], None, layers, storage, packing, threads, progress)


@checked
def sample(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    n: int | None = None,
    frac: float | None = None,
    per_group: int | None = None,
    by: str | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    matching: str | os.PathLike | AnnData | None = None,
    thin: float | None = None,
    seed: int = 0,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    layers: Sequence[str] = (),
    compression: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Write some cells of a file, chosen by their labels, at random, or both, in their original order.

    Parameters
    ----------
    n, frac, per_group
        The number of cells, the fraction of cells, or the maximum number of cells per group of ``by``; give one of
        them, or none if ``where`` or ``matching`` chooses the cells.
    by
        An obs column, whose proportions ``n`` and ``frac`` keep. Cells without a label are a group.
    where
        obs column -> labels; keep only cells with one of the labels in each of the columns.
    matching
        Another file or AnnData with the column ``by``; keep only cells whose label occurs there, in the same cell line
        if both have a column of cell lines.
    thin
        Keep each molecule with this chance: binomial thinning, the same cells at a lower depth. Counts alone.
    seed
        The same seed chooses the same cells, and a smaller sample is a subset of a larger one.

    Raises
    ------
    UsageError
        If not exactly one of ``n``, ``frac`` and ``per_group`` is given (or none with labels), or it cannot be met.
    DataError
        If a column or label does not exist, or no cell is left.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.sample("atlas.h5ad", "few.h5ad", n=50, seed=1).n_cells
    50
    """
    with open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as ds:
        allowed_n, rows, groups = None, None, None
        change: Change = copy_chunk
        if thin is not None:
            change = make_thinning(ds, thin, seed)
            if layers:
                raise UsageError(
                    f"{spell('layers')}: not with {spell('thin')}, which changes one matrix alone",
                    hint="leave one of the two out",
                )
        if where or matching is not None:
            allowed_n = find_allowed(ds, where or {}, by, matching, ds.notes)
        if thin is None or allowed_n is not None or any(v is not None for v in (n, frac, per_group)):
            rows, groups = choose_rows(ds, n=n, frac=frac, per_group=per_group, by=by, seed=seed, allowed_n=allowed_n)
        packing = {"compression": compression, "level": None, "force": force}
        return copy_cells(ds, out, [source, matching], rows, layers, {}, packing, threads, progress, groups, change)


def copy_cells(
    ds: Dataset,
    out: str | os.PathLike,
    reads: Sequence[object],
    rows: np.ndarray | None,
    layers: Sequence[str],
    storage: dict[str, Any],
    packing: dict[str, Any],
    threads: int | None,
    progress: Progress,
    groups: dict[str, int] | None = None,
    change: Change = copy_chunk,
    obs: Table | None = None,
) -> ConvertResult:
    """Write some cells of an open data set as an h5ad; ``obs`` replaces its own obs if it is given."""
    began = time.monotonic()
    path = Path(out)
    guard_outputs([Target(path, "hdf5")], reads=reads, force=packing["force"])
    if path.suffix != ".h5ad":
        raise UsageError(f"{path}: the name does not end in .h5ad", hint="end the name in .h5ad")
    notes: list[str] = []
    names = _choose_layers(ds, layers, notes)
    settings = _get_storage(ds.matrix, storage, rows)
    n_cells = ds.n_cells if rows is None else len(rows)
    share = n_cells / ds.n_cells
    item = settings["dtype"].itemsize
    width = 0 if settings["layout"] == "dense" else 12 if settings["index_dtype"] == "int64" else 8
    values = n_cells * ds.n_genes if ds.matrix.nnz is None or not width else int(ds.matrix.nnz * share)
    need = values * (item + width) if packing["compression"] in (None, "none") else values
    with H5adWriter(
        path,
        n_genes=ds.n_genes,
        n_cells=n_cells,
        obs=ds.obs if obs is None else obs,
        var=ds.var,
        need_bytes=need,
        threads=threads,
        **packing,
        **settings,
    ) as w:
        w.finish(obs_rows=rows)
        carry_extras(ds, w.main, rows=rows)
        progress.start("copy", ds.matrix.stored_bytes * share, "bytes")
        rewrite_matrix(ds.matrix, w.X, change=change, rows=rows, threads=threads, progress=progress)
        progress.finish()
        for name in names:
            with open_dataset(ds.source, **{**ds.part, "layer": name}) as other:
                target = w.add_layer(name, **_get_storage(other.matrix, storage, rows))
                progress.start(f"copy {name}", other.matrix.stored_bytes * share, "bytes")
                rewrite_matrix(other.matrix, target, rows=rows, threads=threads, progress=progress)
                progress.finish()
        nnz = w.X.nnz if w.X.layout != "dense" else None
    return ConvertResult(
        out=path,
        n_cells=n_cells,
        n_genes=ds.n_genes,
        nnz=nnz,
        layout=w.X.layout,
        dtype=str(w.X.dtype),
        layers=tuple(names),
        groups=groups,
        seconds=time.monotonic() - began,
        notes=tuple(ds.notes),
        warnings=(*notes, *w.main.notes),
    )


def _choose_layers(ds: Dataset, layers: Sequence[str], notes: list[str]) -> list[str]:
    """Return the layers to copy, and add a note on the layers that are not copied."""
    choices = [k for m, k in list_choices(ds.source) if m in (None, ds.modality)]
    have = [k for k in choices if k not in ("X", "raw", ds.layer)] if ds.layer != "raw" else []
    for name in () if list(layers) == ["all"] else layers:
        if name not in have:
            raise DataError(f"{ds.label} has no layer {name!r} to copy", hint=f"layers: {', '.join(have) or 'none'}")
    names = have if list(layers) == ["all"] else list(layers)
    left = [k for k in have if k not in names]
    if left:
        notes.append(f"layers that were not copied: {', '.join(left)} (copy them with {spell('layers', 'all')})")
    if "raw" in choices and ds.layer != "raw":
        notes.append(f"raw was not copied (write it as X with {spell('layer', 'raw')})")
    if "X" in choices and ds.layer != "X":
        notes.append(f"X was not copied, because {ds.layer} replaces it")
    return names


def _get_storage(m: Matrix, storage: dict[str, Any], rows: np.ndarray | None) -> dict[str, Any]:
    """Return the layout, dtype, index dtype and chunks of the new matrix, from the options and the source."""
    layout = storage.get("layout") or m.layout
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is not known", hint=f"one of: {', '.join(LAYOUTS)}")
    dtype = storage.get("dtype")
    dtype = dtype or get_storable(m.dtype)
    index = storage.get("index_dtype")
    wide = m.index_dtype is not None and m.index_dtype.itemsize == 8
    contiguous = bool(storage.get("contiguous"))
    nnz = m.nnz if rows is None and contiguous else None
    if contiguous and nnz is None and layout != "dense":
        raise UsageError(
            "a contiguous sparse matrix needs the number of non-zeros in advance", hint="convert it to CSR or CSC first"
        )
    return {
        "layout": layout,
        "dtype": get_value_dtype(dtype),
        "index_dtype": index or ("int64" if wide else "int32"),
        "chunk_len": storage.get("chunk_len"),
        "contiguous": contiguous,
        "nnz": nnz,
    }
