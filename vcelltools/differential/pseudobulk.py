"""Pseudobulks: the sums, means and detection rates of every combination of labels, as a small h5ad file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.differential.groupsums import GroupSums, sum_groups
from vcelltools.errors import DataError, EnvironmentFault, UsageError, check_number, checked, spell
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.remote import set_remote
from vcelltools.io.results import Result
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.runtime.cluster import connect
from vcelltools.runtime.memory import get_free_memory
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from distributed import Client

_BYTES = 24
"""Bytes per group and gene: two words of the sum and one of the count."""
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class PseudobulkResult(Result):
    """The pseudobulks that were written.

    Attributes
    ----------
    out
        The file that was written.
    n_groups, n_genes, n_cells
        Numbers of combinations, of genes, and of the cells in the combinations.
    smallest
        Number of cells of the smallest combination.
    notes
        Notes for the user.
    """

    out: Path
    n_groups: int
    n_genes: int
    n_cells: int
    smallest: int
    notes: tuple[str, ...]


@checked
def pseudobulk(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    by: Sequence[str],
    min_cells: int = 1,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    compression: str | None = None,
    force: bool = False,
    threads: int | None = None,
    dask: str | Client | None = None,
    progress: Progress = SILENT,
) -> PseudobulkResult:
    """Sum the counts of every combination of labels, in one pass, and write an h5ad file with one row per combination.

    Parameters
    ----------
    source
        A file or an AnnData of counts.
    out
        The h5ad file. ``X`` holds the sums (int64). The layers ``mean`` and ``detected`` hold the mean counts per cell
        and the share of cells with a count. obs holds the labels, ``n_cells`` and ``total_counts``. DESeq2, edgeR and
        pydeseq2 take such sums as input.
    by
        obs columns, such as the perturbation and the batch; every combination that occurs is a row.
    min_cells
        Combinations with fewer cells are left out.
    dask
        ``local``, the address of a Dask scheduler, or a Client, whose workers read ranges of cells (of genes, if the
        file is stored gene by gene). The source must be on storage that all workers can access.

    Raises
    ------
    UsageError
        If no column is given, or one is given twice.
    DataError
        If a column is missing, values are not counts, or no combination is large enough.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.pseudobulk("atlas.h5ad", "bulk.h5ad", by=["target_gene"]).n_genes
    100
    """
    path = Path(out)
    if path.suffix != ".h5ad":
        raise UsageError(f"{path} does not end in .h5ad", hint="choose a name that ends in .h5ad")
    check_number("min_cells", min_cells, low=1)
    if not by or len(set(by)) < len(by):
        raise UsageError(
            f"{spell('by')}: {'no column is given' if not by else 'a column is given twice'}",
            hint=f"set {spell('by')} to the obs columns whose labels define the groups",
        )
    guard_outputs([Target(path, "hdf5")], reads=[source], force=force)
    with (
        open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as data,
        connect(dask) as client,
    ):
        set_remote(data, client, modality=modality, layer=layer, feature_type=feature_type, genome=genome)
        notes = list(data.notes)
        codes, obs = _find_groups(data, by, min_cells, notes)
        need = _BYTES * len(obs) * data.n_genes
        if need > 0.8 * get_free_memory():
            raise EnvironmentFault(
                f"{len(obs):,} combinations × {data.n_genes:,} genes need {need / 1e9:.1f} GB for sums, which exceeds "
                "the memory",
                hint=f"use fewer columns in {spell('by')}, or leave out small combinations with {spell('min_cells')}",
            )
        sums = sum_groups(data, codes, len(obs), None, threads=threads, progress=progress)
        if sums.n_merged:
            notes.append(f"{data.label}: {sums.n_merged:,} duplicate entries were summed")
        obs["total_counts"] = sums.sums[:, :, 0].sum(axis=1)
        _write(path, data, obs, sums, compression, force, threads)
    return PseudobulkResult(
        out=path, n_groups=len(obs), n_genes=data.n_genes, n_cells=int(sums.size_k.sum()),
        smallest=int(sums.size_k.min()), notes=tuple(notes),
    )  # fmt: skip


def _find_groups(data: Dataset, by: Sequence[str], min_cells: int, notes: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Return (n,) the combination of every cell (-1: none), and a table of their labels and numbers of cells."""
    import pandas as pd

    found = [data.obs.column(c).factorize() for c in by]
    stack = np.column_stack([codes for codes, _ in found])
    used = (stack >= 0).all(axis=1)
    if not used.all():
        notes.append(f"{data.label}: {int((~used).sum()):,} cells without a label in {', '.join(by)} were left out")
    groups, at = np.unique(stack[used], axis=0, return_inverse=True)
    size = np.bincount(at.reshape(-1), minlength=len(groups))
    keep = size >= min_cells
    if not keep.any():
        raise DataError(
            f"{data.label}: no combination of {', '.join(by)} has {min_cells:,} cells",
            hint=f"the largest has {int(size.max(initial=0)):,}; lower {spell('min_cells')}",
        )
    if not keep.all():
        notes.append(
            f"{data.label}: {int((~keep).sum()):,} combinations with fewer than {min_cells:,} cells were left out "
            f"({int(size[~keep].sum()):,} cells)"
        )
    number = np.where(keep, np.cumsum(keep) - 1, -1)
    codes = np.full(len(stack), -1, np.int32)
    codes[used] = number[at.reshape(-1)]
    groups, size = groups[keep], size[keep]
    labels = {
        c: pd.Categorical.from_codes(groups[:, i], categories=pd.Index(levels).astype(str))
        for i, (c, (_, levels)) in enumerate(zip(by, found, strict=True))
    }
    names = ["|".join(row) for row in zip(*(v.astype(str) for v in labels.values()), strict=True)]
    if len(set(names)) < len(names):  # labels that contain the separator
        names = [f"{v}#{i}" for i, v in enumerate(names)]
    return codes, pd.DataFrame({**labels, "n_cells": size}, index=pd.Index(names))


def _write(
    path: Path,
    data: Dataset,
    obs: pd.DataFrame,
    sums: GroupSums,
    compression: str | None,
    force: bool,
    threads: int | None,
) -> None:
    from vcelltools.io.write.h5ad import H5adWriter

    n = len(obs)
    with H5adWriter(
        path, n_genes=data.n_genes, n_cells=n, var=data.var, obs=obs, dtype="int64", compression=compression,
        force=force, threads=threads, need_bytes=20 * n * data.n_genes,
    ) as w:  # fmt: skip
        layers = {name: w.add_layer(name, dtype="float64") for name in ("mean", "detected")}
        for a in range(0, n, _ROWS):
            rows = slice(a, a + _ROWS)
            total, size = sums.sums[rows, :, 0], sums.size_k[rows, None]
            w.append_dense(total)
            layers["mean"].append_dense(total / size)
            layers["detected"].append_dense(sums.nnz_kg[rows] / size)
