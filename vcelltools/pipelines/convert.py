"""``convert`` and ``sample``: any readable file, or some of its cells, streamed to a new h5ad."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.atomic import check_output
from vcelltools.io.dataset import list_choices
from vcelltools.io.extras import carry_extras
from vcelltools.io.matrix import Matrix
from vcelltools.io.write import LAYOUTS, H5adWriter, get_value_dtype
from vcelltools.pipelines.choose import choose_rows, find_allowed
from vcelltools.pipelines.rewrite import rewrite_matrix
from vcelltools.progress import SILENT, Progress
from vcelltools.results import Result

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Result):
    """What was written.

    Attributes
    ----------
    out
        The new h5ad.
    n_cells, n_genes, nnz
        Its shape, and the values stored (None for dense).
    layout, dtype, layers
        How X is stored, and which layers were copied.
    groups
        Cells by group, where cells were sampled by a column.
    seconds
        Wall time.
    notes, warnings
        What the reader decided; what the user should know.
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


def convert(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    modality: str | None = None,
    layer: str | None = None,
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
        What becomes X.
    layers
        Layers to copy besides; ``["all"]`` copies all of them.
    layout, dtype, index_dtype
        Of the new X and layers; the source's by default. Values that a dtype cannot hold are an error.
    compression, level, chunk_len, contiguous
        As in :class:`vcelltools.io.write.H5adWriter`.

    Raises
    ------
    UsageError
        For an existing output without ``force`` and for options that cannot be.
    DataError
        For a damaged source and for values that do not fit.
    """
    storage = {
        "layout": layout,
        "dtype": dtype,
        "index_dtype": index_dtype,
        "chunk_len": chunk_len,
        "contiguous": contiguous,
    }
    if contiguous and chunk_len is not None:
        raise UsageError("a contiguous matrix has no chunks", hint="leave --chunk-len or --contiguous out")
    packing = {"compression": compression, "level": level, "force": force}
    with open_dataset(source, modality=modality, layer=layer) as ds:
        return _copy(ds, out, None, layers, storage, packing, threads, progress)


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
    seed: int = 0,
    modality: str | None = None,
    layer: str | None = None,
    layers: Sequence[str] = (),
    compression: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Write some cells of a file, chosen by their labels, at random, or both, in their old order.

    Parameters
    ----------
    n, frac, per_group
        One of: so many cells; a share of them; so many of every group of ``by`` (all where it has fewer). None where
        ``where`` or ``matching`` chooses.
    by
        An obs column; ``n`` and ``frac`` then keep its proportions. Cells without a label are a group.
    where
        obs column -> labels: only cells that have one of these in each of these columns.
    matching
        Another file or AnnData with the column ``by``: only cells whose label occurs there.
    seed
        The same seed chooses the same cells, and of two sizes the smaller choice lies within the larger.

    Raises
    ------
    UsageError
        Unless one of ``n``, ``frac`` and ``per_group`` is given and can be met, or none where labels choose.
    DataError
        For a column or a label that is not there, and where no cell is left.
    """
    with open_dataset(source, modality=modality, layer=layer) as ds:
        allowed_n = None
        if where or matching is not None:
            allowed_n = find_allowed(ds, where or {}, by, matching)
        rows, groups = choose_rows(ds, n=n, frac=frac, per_group=per_group, by=by, seed=seed, allowed_n=allowed_n)
        packing = {"compression": compression, "level": None, "force": force}
        return _copy(ds, out, rows, layers, {}, packing, threads, progress, groups)


def _copy(
    ds: Dataset,
    out: str | os.PathLike,
    rows: np.ndarray | None,
    layers: Sequence[str],
    storage: dict[str, Any],
    packing: dict[str, Any],
    threads: int | None,
    progress: Progress,
    groups: dict[str, int] | None = None,
) -> ConvertResult:
    began = time.monotonic()
    path = check_output(out, force=packing["force"], sources=[ds.source])
    if path.suffix != ".h5ad":
        raise UsageError(f"{path}: the name does not end in .h5ad", hint="name it so")
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
        obs=ds.obs,
        var=ds.var,
        need_bytes=need,
        threads=threads,
        **packing,
        **settings,
    ) as w:
        w.finish(obs_rows=rows)
        carry_extras(ds, w.main, notes, rows=rows)
        progress.start("copy", ds.matrix.stored_bytes * share, "bytes")
        rewrite_matrix(ds.matrix, w.X, rows=rows, threads=threads, progress=progress)
        progress.finish()
        for name in names:
            with open_dataset(ds.source, modality=ds.modality, layer=name) as other:
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
        warnings=tuple(notes),
    )


def _choose_layers(ds: Dataset, layers: Sequence[str], notes: list[str]) -> list[str]:
    """Return the layers to copy; what is left behind is added to ``notes``."""
    choices = [k for m, k in list_choices(ds.source) if m in (None, ds.modality)]
    have = [k for k in choices if k not in ("X", "raw", ds.layer)] if ds.layer != "raw" else []
    for name in () if list(layers) == ["all"] else layers:
        if name not in have:
            raise DataError(f"{ds.label}: has no layer {name!r} to copy", hint=f"layers: {', '.join(have) or 'none'}")
    names = have if list(layers) == ["all"] else list(layers)
    left = [k for k in have if k not in names]
    if left:
        notes.append(f"layers left behind: {', '.join(left)} (--layers all copies them)")
    if "raw" in choices and ds.layer != "raw":
        notes.append("raw left behind (--layer raw makes it X)")
    if "X" in choices and ds.layer != "X":
        notes.append(f"X left behind: {ds.layer} takes its place")
    return names


def _get_storage(m: Matrix, storage: dict[str, Any], rows: np.ndarray | None) -> dict[str, Any]:
    """Return the new matrix's layout, dtype, index dtype and chunks, from what was asked for and the source."""
    layout = storage.get("layout") or m.layout
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is not known", hint=f"one of: {', '.join(LAYOUTS)}")
    dtype = storage.get("dtype")
    if dtype is None:
        dtype = m.dtype.newbyteorder("=")
        dtype = np.dtype(np.float32) if dtype == np.float16 else dtype
    index = storage.get("index_dtype")
    wide = m.index_dtype is not None and m.index_dtype.itemsize == 8
    contiguous = bool(storage.get("contiguous"))
    nnz = m.nnz if rows is None and contiguous else None
    if contiguous and nnz is None and layout != "dense":
        raise UsageError(
            "a contiguous sparse matrix needs the number of non-zeros beforehand", hint="convert it to CSR or CSC first"
        )
    return {
        "layout": layout,
        "dtype": get_value_dtype(dtype),
        "index_dtype": index or ("int64" if wide else "int32"),
        "chunk_len": storage.get("chunk_len"),
        "contiguous": contiguous,
        "nnz": nnz,
    }
