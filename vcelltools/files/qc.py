"""Quality control of cells: scanpy's metrics, flags, and a report that compares batches.

Flags follow stated rules, and no cell is dropped unless requested. Filtered matrices hold no empty
droplets, so ambient RNA cannot be estimated from them. Instead, the report shows the share of counts in the top genes
and the fraction of cells that express them, which are high if there is much ambient RNA.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, checked
from vcelltools.files.chosen_cells import ExtendedTable
from vcelltools.genes.union import Member, Union, name_members, open_member, open_union, read_batches, read_rows
from vcelltools.io import H5adWriter
from vcelltools.io.chunks import CsrChunk
from vcelltools.io.results import Shown
from vcelltools.io.write.atomic import atomic_file, check_output
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("total_counts", "n_genes_by_counts", "pct_counts_mt", "pct_counts_in_top_50_genes")
FLAGS = ("qc_empty", "qc_doublet", "qc_mt", "qc_outlier")
PASS = "qc_pass"
N_LEADING, N_AMBIENT = 50, 20
_ODD_MADS = 5.0
_MAX_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits beyond which a cell is flagged.

    Attributes
    ----------
    min_genes
        ``qc_empty``: fewer genes with a count.
    max_counts
        ``qc_doublet``: more counts.
    max_mt
        ``qc_mt``: more than this percentage of counts in mitochondrial genes.
    mads
        ``qc_outlier``: log1p counts, log1p genes or the share of the top genes further from the median of the batch
        than this number of median absolute deviations; no cell is flagged if these are 0.
    """

    min_genes: int = 200
    max_counts: int = 50_000
    max_mt: float = 20.0
    mads: float = 5.0


@dataclass(frozen=True, kw_only=True)
class QcResult(Shown):
    """Metrics and flags of every cell, and the report.

    Attributes
    ----------
    batch, batches
        (n,) batch of each cell, and the labels.
    barcodes, files
        (n,) names of the cells; their files, with the first cell of each.
    columns
        Name -> (n,) metrics and flags.
    report
        One row per batch: cells, flags, medians, sparsity, top genes, ``odd`` metrics.
    warnings
        Messages for the user.
    """

    batch: np.ndarray
    batches: list[str]
    barcodes: np.ndarray
    starts: np.ndarray
    names: list[str]
    columns: dict[str, np.ndarray]
    report: list[dict[str, Any]]
    limits: Limits
    warnings: list[str] = field(default_factory=list)

    @property
    def n_pass(self) -> int:
        """Number of cells without a flag."""
        return int(np.count_nonzero(self.columns[PASS]))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per cell: file, barcode, batch, metrics, flags."""
        import pandas as pd

        file = np.repeat(np.arange(len(self.names)), np.diff(self.starts))
        head = {
            "file": pd.Categorical.from_codes(file, categories=self.names),  # type: ignore[arg-type]
            "barcode": self.barcodes,
            "batch": pd.Categorical.from_codes(self.batch, categories=self.batches),  # type: ignore[arg-type]
        }
        return pd.DataFrame({**head, **self.columns})

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        n = len(self.batch)
        flags = {f: int(np.count_nonzero(self.columns[f])) for f in FLAGS}
        return {"n_cells": n, "n_pass": self.n_pass, "flags": flags, "batches": self.report, "warnings": self.warnings}

    def write(self, fpath: str | os.PathLike, *, force: bool = False) -> Path:
        """Write the table of the cells as Parquet."""
        with atomic_file(fpath, force=force) as tmp:
            self.to_frame().to_parquet(tmp, index=False, compression="zstd")
        return Path(fpath)


@checked
def qc(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    batch_key: str | None = None,
    limits: Limits | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> QcResult:
    """Measure the quality of every cell of one or more files of counts.

    Parameters
    ----------
    files
        Any files that :func:`vcelltools.io.open_dataset` opens.
    batch_key
        obs column of the batch (experiment); by default, each file is a batch.
    limits
        Limits beyond which a cell is flagged.

    Raises
    ------
    DataError
        If a file is damaged, does not hold counts or lacks the column.

    Examples
    --------
    >>> import vcelltools as vc
    >>> frame = vc.qc("atlas.h5ad", batch_key="batch").to_frame()
    >>> len(frame), "qc_pass" in frame
    (200, True)
    """
    many = files if isinstance(files, list | tuple) else [files]
    members = name_members(
        many,  # type: ignore[arg-type]
        layer=layer, modality=modality, feature_type=feature_type, genome=genome,
    )  # fmt: skip
    with open_union(members, threads=threads, progress=progress) as union:
        batch, batches = read_batches(union, batch_key)
        return measure(union, batch, batches, limits=limits or Limits(), threads=threads, progress=progress)


def measure(
    union: Union,
    batch: np.ndarray,
    batches: list[str],
    *,
    limits: Limits,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> QcResult:
    """Measure and flag the cells of an open union; see :func:`qc`."""
    marked = np.array([str(s).startswith(("MT-", "mt-")) for s in union.genes.symbols[: union.genes.n_kept]], bool)
    of_marked, leading, sums, cells = _sum_up(union, marked, batch, len(batches), threads=threads, progress=progress)
    total, genes = union.survey.umi_count, union.survey.gene_count  # counted in the same pass, or before
    with np.errstate(invalid="ignore"):
        columns: dict[str, np.ndarray] = {
            "total_counts": total.copy(),
            "n_genes_by_counts": genes.copy(),
            "pct_counts_mt": 100.0 * of_marked / total,
            "pct_counts_in_top_50_genes": 100.0 * leading / total,
        }
    columns |= flag(columns, batch, len(batches), limits)
    warnings = []
    if not marked.any():
        warnings.append("no gene symbol begins with MT- or mt-, so the mitochondrial share is unknown")
    barcodes = np.concatenate([_read_names(m) for m in union.members])
    report = _report(union, columns, batch, batches, sums, cells)
    odd = [r for r in report if r["odd"]]
    warnings += [f"{r['batch']}: {', '.join(r['odd'])} differ strongly from the other batches" for r in odd[:10]]
    return QcResult(
        batch=batch,
        batches=batches,
        barcodes=barcodes,
        starts=union.starts,
        names=[m.name for m in union.members],
        columns=columns,
        report=report,
        limits=limits,
        warnings=warnings,
    )


def _read_names(m: Member) -> np.ndarray:
    with open_member(m) as ds:
        return ds.obs.index


def _sum_up(
    union: Union, marked: np.ndarray, batch: np.ndarray, n_batches: int, *, threads: int | None, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (marked counts, top counts) per cell, and (counts, cells with a count) per batch and gene."""
    from vcelltools.kernels.qc import measure_rows

    n, g = int(union.starts[-1]), union.genes.n_kept
    if n_batches * g * 12 > _MAX_BYTES:
        raise UsageError(f"{n_batches:,} batches of {g:,} genes do not fit in memory", hint="choose a coarser column")
    of_marked, leading = np.zeros(n, np.int64), np.zeros(n, np.int64)

    def make(chunk: CsrChunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(chunk.start, chunk.start + chunk.n_rows)
        here, code = np.unique(batch[part], return_inverse=True)
        sums, cells = np.zeros((len(here), g), np.int64), np.zeros((len(here), g), np.int32)
        measure_rows(
            chunk.indptr, chunk.indices, chunk.data, marked, N_LEADING, np.zeros(N_LEADING, np.int64), code,
            of_marked[part], leading[part], sums, cells,
        )  # fmt: skip
        return here, sums, cells

    sums, cells = np.zeros((n_batches, g), np.int64), np.zeros((n_batches, g), np.int32)
    for here, some, few in union.map_cells(make, threads=threads, progress=progress, phase="measuring"):
        sums[here] += some
        cells[here] += few
    return of_marked, leading, sums, cells


def _take(rows: tuple[np.ndarray, np.ndarray, np.ndarray], at: np.ndarray):
    """Return some rows of a CSR block."""
    indptr, indices, data = rows
    if len(at) == len(indptr) - 1:
        return rows
    lengths = np.diff(indptr)[at]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    where = np.repeat(indptr[at] - ends[:-1], lengths) + np.arange(ends[-1])
    return ends, indices[where], data[where]


def flag(columns: dict[str, np.ndarray], batch: np.ndarray, n_batches: int, limits: Limits) -> dict[str, np.ndarray]:
    """Return the flags of cells with these metrics."""
    with np.errstate(invalid="ignore"):
        out = {
            "qc_empty": columns["n_genes_by_counts"] < limits.min_genes,
            "qc_doublet": columns["total_counts"] > limits.max_counts,
            "qc_mt": columns["pct_counts_mt"] > limits.max_mt,
        }
    outlier = np.zeros(len(batch), bool)
    measured = (
        np.log1p(columns["total_counts"]),
        np.log1p(columns["n_genes_by_counts"]),
        columns["pct_counts_in_top_50_genes"],
    )
    order = np.argsort(batch, kind="stable")
    for cells in np.split(order, np.searchsorted(batch[order], np.arange(1, n_batches))):
        for values in measured:
            outlier[cells] |= get_outliers(values[cells], limits.mads)
    out["qc_outlier"] = outlier
    out[PASS] = ~(out["qc_empty"] | out["qc_doublet"] | out["qc_mt"] | out["qc_outlier"])
    return out


def get_outliers(values: np.ndarray, mads: float) -> np.ndarray:
    """Return whether values are further from their median than ``mads`` × the median absolute deviation."""
    known = ~np.isnan(values)
    if not known.any():
        return np.zeros(len(values), bool)
    off = np.abs(values - np.median(values[known]))
    mad = np.median(off[known])
    return known & (off > mads * mad) if mad > 0 else np.zeros(len(values), bool)


def _report(
    union: Union,
    columns: dict[str, np.ndarray],
    batch: np.ndarray,
    batches: list[str],
    sums: np.ndarray,
    cells: np.ndarray,
) -> list[dict[str, Any]]:
    rows = []
    g = union.genes.n_kept
    lacking = np.array([len(union.genes.keys) - len(np.unique(c)) for c in union.genes.columns])
    file = np.repeat(np.arange(len(union.members)), np.diff(union.starts))
    for k, name in enumerate(batches):
        mine = batch == k
        n = int(mine.sum())
        top = np.argsort(-sums[k], kind="stable")[:N_AMBIENT]
        total = int(sums[k].sum())
        row: dict[str, Any] = {"batch": name, "cells": n, "pass": int(columns[PASS][mine].sum())}
        row |= {f: int(columns[f][mine].sum()) for f in FLAGS}
        for metric in METRICS:
            known = columns[metric][mine]
            known = known[~np.isnan(known)] if known.dtype.kind == "f" else known
            row[f"median_{metric}"] = float(np.median(known)) if len(known) else None
        row["sparsity"] = 1.0 - int(cells[k].sum()) / max(n * g, 1)
        row["missing_genes"] = int(lacking[np.unique(file[mine])].max()) if n else None
        row["leading_share"] = float(sums[k][top].sum() / total) if total else None
        row["leading_cells"] = float(cells[k][top].mean() / n) if n else None
        row["odd"] = []
        rows.append(row)
    for key in [f"median_{m}" for m in METRICS] + ["sparsity", "leading_share", "leading_cells"]:
        values = np.array([np.nan if r[key] is None else r[key] for r in rows])
        for k in np.flatnonzero(get_outliers(values, _ODD_MADS)).tolist():
            rows[k]["odd"].append(key)
    return rows


def write_flagged(
    result: QcResult,
    file: str | os.PathLike,
    out: str | os.PathLike,
    *,
    drop: bool = False,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the counts of a file to an h5ad with the metrics and flags in obs.

    X (as CSR), obs and var are copied; layers, obsm and uns are not.

    Parameters
    ----------
    result
        The result of :func:`qc` for this file only.
    drop
        Whether to drop flagged cells.

    Raises
    ------
    DataError
        If no cell is left, or the file has a different number of cells than the result.
    """
    target = check_output(out, force=force)
    (member,) = name_members([file], layer=layer, modality=modality, feature_type=feature_type, genome=genome)
    with open_member(member) as ds:
        if ds.n_cells != len(result.batch):
            raise DataError(f"{file} has {ds.n_cells:,} cells, but {len(result.batch):,} were measured")
        keep = np.flatnonzero(result.columns[PASS]) if drop else None
        if keep is not None and not len(keep):
            raise DataError(f"{file}: every cell is flagged", hint="check the limits")
        dtype = ds.matrix.dtype.newbyteorder("=")
        with H5adWriter(
            target, n_genes=ds.n_genes, var=ds.var, dtype=dtype, compression="gzip", force=force, threads=threads
        ) as writer:
            progress.start("writing", ds.n_cells, "cells")
            for start, indptr, indices, data in read_rows(ds):
                b = len(indptr) - 1
                rows = (indptr, indices, data)
                if keep is not None:
                    at = keep[np.searchsorted(keep, start) : np.searchsorted(keep, start + b)] - start
                    rows = _take(rows, at)
                writer.append_csr(*rows)
                progress.advance(b)
            writer.finish(obs=ExtendedTable(ds.obs, result.columns), obs_rows=keep)
            progress.finish()
    return target
