"""Differential expression of every perturbation against the controls: a rank test or a negative binomial, streamed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.errors import DataError, NotCountsError, UsageError
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.atomic import atomic_file, check_output
from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.sides import Cells, ReadOptions, find_scale, read_cells, reduce_side
from vcelltools.stream import run_spans

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

TESTS = ("wilcoxon", "nb")


@dataclass(frozen=True, kw_only=True)
class DeResult:
    """Every perturbation against the controls; rows are perturbations, columns genes.

    Attributes
    ----------
    perturbations, genes
        Names.
    n_cells_p, n_controls
        Cells of each perturbation, and of the controls.
    mean_pg, control_mean_g
        Mean counts per ten thousand (of the values in natural units where the file holds log1p).
    log2fc_pg
        log2((mean + ε) / (control mean + ε)).
    statistic_pg
        Mann-Whitney U of the perturbation (wilcoxon), or the count's distance from its expectation in standard
        deviations (nb).
    p_pg, fdr_pg
        Two-sided p, and Benjamini-Hochberg within each perturbation (NaN for filtered genes).
    dispersion_g
        nb: variance = mean + dispersion · mean²; None otherwise.
    settings, notes
        How it was computed, and what to know about it.
    """

    perturbations: list[str]
    genes: np.ndarray
    n_cells_p: np.ndarray
    n_controls: int
    mean_pg: np.ndarray
    control_mean_g: np.ndarray
    log2fc_pg: np.ndarray
    statistic_pg: np.ndarray
    p_pg: np.ndarray
    fdr_pg: np.ndarray
    dispersion_g: np.ndarray | None
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def significant(self, fdr: float = 0.05) -> dict[str, int]:
        """Return perturbation -> number of genes with adjusted p below ``fdr``."""
        n = (self.fdr_pg < fdr).sum(axis=1)
        return dict(zip(self.perturbations, n.tolist(), strict=True))

    def _columns(self) -> dict[str, Any]:
        n_p, n_g = self.p_pg.shape
        keep = ~np.isnan(self.fdr_pg).ravel()
        return {
            "perturbation": (self.perturbations, np.repeat(np.arange(n_p, dtype=np.int32), n_g)[keep]),
            "gene": ([str(g) for g in self.genes], np.tile(np.arange(n_g, dtype=np.int32), n_p)[keep]),
            "n_cells": np.repeat(self.n_cells_p, n_g)[keep],
            "n_controls": np.full(n_p * n_g, self.n_controls)[keep],
            "mean": self.mean_pg.ravel()[keep],
            "control_mean": np.tile(self.control_mean_g, n_p)[keep],
            "log2_fold_change": self.log2fc_pg.ravel()[keep],
            "statistic": self.statistic_pg.ravel()[keep],
            "p_value": self.p_pg.ravel()[keep],
            "fdr": self.fdr_pg.ravel()[keep],
        }

    def to_frame(self) -> pd.DataFrame:
        """Return the tidy table: one row a perturbation and gene."""
        import pandas as pd

        out = {}
        for name, v in self._columns().items():
            out[name] = pd.Categorical.from_codes(v[1], categories=pd.Index(v[0])) if isinstance(v, tuple) else v
        return pd.DataFrame(out)

    def to_json(self) -> dict[str, Any]:
        """Return the summary."""
        return {
            "n_perturbations": len(self.perturbations),
            "n_genes": len(self.genes),
            "n_controls": self.n_controls,
            "significant": self.significant(),
            "settings": self.settings,
            "notes": self.notes,
        }

    def write(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the tidy table, as Parquet or CSV by the name's end."""
        import pyarrow as pa

        p = check_output(path, force=force)
        check_name(p)
        table = pa.table(
            {
                k: pa.DictionaryArray.from_arrays(pa.array(v[1]), pa.array(v[0])) if isinstance(v, tuple) else v
                for k, v in self._columns().items()
            }
        )
        with atomic_file(p, force=force) as tmp:
            if p.suffix == ".csv":
                from pyarrow import csv

                plain = pa.table([c.cast(pa.string()) if pa.types.is_dictionary(c.type) else c for c in table.columns],
                                 names=table.column_names)  # fmt: skip
                csv.write_csv(plain, tmp)
            else:
                from pyarrow import parquet

                parquet.write_table(table, tmp, compression="zstd")
        return p


def check_name(path: str | Path) -> None:
    """Raise a :class:`UsageError` unless the name says a format that :meth:`DeResult.write` has."""
    if Path(path).suffix not in (".parquet", ".csv"):
        raise UsageError(f"{path}: the name ends in neither .parquet nor .csv", hint="choose another --out")


def de(
    source: str | os.PathLike | AnnData,
    *,
    test: str = "wilcoxon",
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    keep: str | None = None,
    epsilon: float = 1e-9,
    min_cpm: float | None = None,
    continuity: bool = True,
    exact: bool = False,
    modality: str | None = None,
    layer: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> DeResult:
    """Compare every perturbation with the controls.

    Parameters
    ----------
    source
        A file or an AnnData: counts, or (wilcoxon) log1p-normalised values.
    test
        ``"wilcoxon"``: two-sided Mann-Whitney U on log1p of counts per ten thousand, mid-ranks, tie-corrected.
        ``"nb"``: see :func:`compare_counts`; needs counts.
    keep
        An obs column of booleans: only cells that are true are used.
    epsilon
        Added to both means of the fold change, in counts per ten thousand.
    min_cpm
        Genes at most this (pooled counts per million) in both groups leave before the adjustment.
    continuity, exact
        wilcoxon: the continuity correction; exact p where a side has at most eight cells and nothing is tied.

    Raises
    ------
    DataError
        No such column or control, invalid values.
    NotCountsError
        nb on values that are not counts.
    """
    if test not in TESTS:
        raise UsageError(f"no test {test!r}", hint=f"--test, one of: {', '.join(TESTS)}")
    if epsilon < 0:
        raise UsageError(f"epsilon is {epsilon}; zero or more expected")
    with open_dataset(source, modality=modality, layer=layer) as dataset:
        cells = _keep_cells(dataset, read_cells(dataset, pert_col, control), keep, control, pert_col)
        run = _run_wilcoxon if test == "wilcoxon" else _run_nb
        found = run(dataset, cells, control, continuity, exact, threads, progress)
        genes, notes = dataset.var.index, list(dataset.notes)
    k = cells.labels.index(control)
    perts = np.delete(np.arange(len(cells.labels)), k)
    size_k = np.bincount(cells.codes[cells.codes >= 0], minlength=len(cells.labels))
    mean, base = found["mean_kg"][perts], found["mean_kg"][k]
    with np.errstate(divide="ignore", invalid="ignore"):
        log2fc = np.log2((mean + epsilon) / (base + epsilon))
    log2fc[np.isnan(log2fc)] = 0
    p = found["p_kg"][perts]
    fdr = np.full_like(p, np.nan)
    if min_cpm is None:
        fdr[...] = adjust_bh(p)
    else:
        total = found["mean_kg"].sum(axis=1, keepdims=True)
        cpm = found["mean_kg"] / np.where(total > 0, total, 1) * 1e6
        kept = (cpm[perts] > min_cpm) | (cpm[k] > min_cpm)
        for i in range(len(p)):
            if kept[i].any():
                fdr[i, kept[i]] = adjust_bh(p[i, kept[i]])
    if cells.n_missing:
        notes.append(f"{cells.n_missing:,} cells without a label (or not kept) were left out")
    return DeResult(
        perturbations=[cells.labels[i] for i in perts],
        genes=genes,
        n_cells_p=size_k[perts],
        n_controls=int(size_k[k]),
        mean_pg=mean,
        control_mean_g=base,
        log2fc_pg=log2fc,
        statistic_pg=found["statistic_kg"][perts],
        p_pg=p,
        fdr_pg=fdr,
        dispersion_g=found.get("dispersion_g"),
        settings={
            "test": test, "pert_col": pert_col, "control": control, "keep": keep, "epsilon": epsilon,
            "min_cpm": min_cpm, "continuity": continuity, "exact": exact,
        },
        notes=notes + found["notes"],
    )  # fmt: skip


def _keep_cells(dataset: Dataset, cells: Cells, keep: str | None, control: str, pert_col: str) -> Cells:
    """Leave out cells that are not kept, and labels that no kept cell has."""
    if keep is None:
        return cells
    column = dataset.obs.column(keep)
    if column.kind != "bool":
        raise DataError(f"{dataset.label}: obs/{keep} is a {column.kind} column; --keep needs booleans")
    assert column.values is not None
    wanted = column.values.astype(bool) & (True if column.missing is None else ~column.missing)
    codes = np.where(wanted, cells.codes, -1)
    left = np.unique(codes[codes >= 0])
    labels = tuple(cells.labels[i] for i in left)
    if control not in labels:
        raise DataError(f"{dataset.label}: no cell with obs/{pert_col} = {control!r} is kept by obs/{keep}")
    lookup = np.full(len(cells.labels) + 1, -1, np.int32)
    lookup[left] = np.arange(len(left), dtype=np.int32)
    return replace(
        cells,
        labels=labels,
        codes=lookup[codes],
        order=tuple(v for v in cells.order if v in labels),
        appearance=tuple(v for v in cells.appearance if v in labels),
        n_missing=int(np.count_nonzero(codes < 0)),
    )


def _run_wilcoxon(
    dataset: Dataset,
    cells: Cells,
    control: str,
    continuity: bool,
    exact: bool,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    scale = find_scale(dataset, threads=threads, progress=progress)
    options = ReadOptions(
        continuity=continuity,
        exact=exact,
        moment="expm1",
        cp10k=scale.kind == "counts",
        threads=threads,
        wide=scale.kind == "counts",
    )
    side = reduce_side(dataset, cells, control, scale, options, progress=progress)
    sums = side.sums
    assert sums.moment_kg is not None
    return {
        "mean_kg": sums.moment_kg / np.maximum(sums.size_k, 1)[:, None],
        "statistic_kg": sums.u_kg,
        "p_kg": sums.p_kg,
        "notes": side.notes,
    }


@dataclass(frozen=True, kw_only=True)
class CountMoments:
    """Sums over the cells of each group; sizes are total counts.

    Attributes
    ----------
    sum_kg, square_kg, cross_kg
        Σy, Σy² and Σ(y · size).
    size_k, size2_k, n_k
        Σ size, Σ size², and the number of cells.
    """

    sum_kg: np.ndarray
    square_kg: np.ndarray
    cross_kg: np.ndarray
    size_k: np.ndarray
    size2_k: np.ndarray
    n_k: np.ndarray


def get_moments(
    dataset: Dataset, cells: Cells, library_n: np.ndarray, *, threads: int | None = None, progress: Progress = SILENT
) -> CountMoments:
    """Stream the matrix once and sum."""
    from vcelltools.kernels.groupmoments import csc_group_moments, csr_group_moments, dense_group_moments

    matrix, codes = dataset.matrix, cells.codes
    shape = (len(cells.labels), matrix.shape[1])

    def visit(state: tuple[np.ndarray, ...], chunk: object, _: object) -> None:
        if isinstance(chunk, CsrChunk):
            rows = slice(chunk.start, chunk.start + chunk.n_rows)
            bad = csr_group_moments(chunk.indptr, chunk.indices, chunk.data, codes[rows], library_n[rows], *state)
        elif isinstance(chunk, CscChunk):
            bad = csc_group_moments(chunk.indptr, chunk.indices, chunk.data, chunk.start, codes, library_n, *state)
        else:
            assert isinstance(chunk, DenseChunk)
            rows = slice(chunk.row_start, chunk.row_start + len(chunk.block))
            bad = dense_group_moments(chunk.block, chunk.col_start, codes[rows], library_n[rows], *state)
        if bad >= 0:
            raise DataError(f"{dataset.label}: the index {chunk.indices[bad]} is out of range")  # type: ignore[union-attr]

    progress.start("counting", matrix.stored_bytes, "bytes")
    states = run_spans(
        matrix, matrix.plan(), lambda: tuple(np.zeros(shape) for _ in range(3)), visit, threads=threads,
        progress=progress,
    )  # fmt: skip
    progress.finish()
    total = [np.sum([s[i] for s in states], axis=0) for i in range(3)]
    used = codes >= 0
    n = shape[0]
    return CountMoments(
        sum_kg=total[0],
        square_kg=total[1],
        cross_kg=total[2],
        size_k=np.bincount(codes[used], library_n[used], n),
        size2_k=np.bincount(codes[used], library_n[used] ** 2, n),
        n_k=np.bincount(codes[used], minlength=n),
    )


def estimate_dispersion(m: CountMoments) -> np.ndarray:
    """Return (g,) the negative binomial's dispersion by the method of moments, pooled over groups.

    Each group has its own rate μ; E Σ(y − sμ)² = Σ(sμ + α s²μ²), with n/(n − 1) for the estimated rate. Negative
    estimates are zero (a Poisson).
    """
    some = (m.n_k > 1) & (m.size_k > 0)
    size, size2, n = (v[some].astype(np.float64)[:, None] for v in (m.size_k, m.size2_k, m.n_k))
    rate = m.sum_kg[some] / size
    squares = m.square_kg[some] - 2 * rate * m.cross_kg[some] + rate**2 * size2
    over = (squares * n / (n - 1) - rate * size).sum(axis=0)
    scale = (rate**2 * size2).sum(axis=0)
    return np.maximum(np.divide(over, scale, out=np.zeros_like(over), where=scale > 0), 0.0)


def compare_counts(m: CountMoments, control: int) -> dict[str, np.ndarray]:
    """Test each group's total count against what the controls foretell.

    With y ~ NB(s·μ, dispersion α), s the size of the cell, the controls' total Y₀ over sizes S₀ foretells a group
    of sizes S with mean m = S·(Y₀ + ½)/S₀ and variance

        v = m + α μ² Σs² + S² (μ/S₀ + α μ² Σs₀²/S₀²),   μ the rate of both together,

    the first two terms the group's own noise, the last the controls'. A negative binomial of that mean and variance
    gives the two-sided mid-p: exact for discreteness and skew where counts are few, a z-test where they are many.
    α comes from :func:`estimate_dispersion`. The half count is Jeffreys' prior, for genes the controls lack.
    """
    from scipy.special import betainc

    alpha = estimate_dispersion(m)
    size, size2 = m.size_k[:, None], m.size2_k[:, None]
    y0, s0, q0 = m.sum_kg[control], float(m.size_k[control]), float(m.size2_k[control])
    mean = size * (y0 + 0.5) / s0
    both = size + s0
    rate = (m.sum_kg + y0 + 0.5) / np.maximum(both, 1)
    var = mean + alpha * rate**2 * size2 + size**2 * (rate / s0 + alpha * rate**2 * q0 / s0**2)
    y = m.sum_kg
    with np.errstate(divide="ignore", invalid="ignore"):
        shape = mean**2 / (var - mean)
        chance = mean / var
        below = np.where(y > 0, betainc(shape, np.maximum(y, 1), chance), 0.0)  # P(Y < y)
        upto = betainc(shape, y + 1, chance)  # P(Y <= y)
        above = np.where(y > 0, betainc(np.maximum(y, 1), shape, 1 - chance), 1.0)  # P(Y >= y)
        beyond = betainc(y + 1, shape, 1 - chance)  # P(Y > y)
        p = np.minimum(1.0, (np.minimum(below + upto, above + beyond)))  # twice the mean of the strict and wide tails
        z = (y - mean) / np.sqrt(var)
    nothing = (y + y0 == 0) | (size == 0)
    p, z = np.where(nothing, 1.0, p), np.where(nothing, 0.0, z)
    p[control], z[control] = np.nan, np.nan
    return {"p_kg": p, "statistic_kg": z, "dispersion_g": alpha}


def _run_nb(
    dataset: Dataset,
    cells: Cells,
    control: str,
    continuity: bool,
    exact: bool,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    scale = find_scale(dataset, threads=threads, progress=progress)
    if scale.kind != "counts":
        raise NotCountsError(
            f"{dataset.label}: {dataset.layer} holds values with fractional parts; --test nb needs counts",
            hint="--layer counts, or --test wilcoxon",
        )
    assert scale.library_n is not None
    m = get_moments(dataset, cells, scale.library_n, threads=threads, progress=progress)
    k = cells.labels.index(control)
    if not m.size_k[k] > 0:
        raise DataError(
            f"{dataset.label}: the {int(m.n_k[k]):,} control cells hold no counts at all",
            hint="--test nb foretells each group's counts from theirs; --layer gives another matrix",
        )
    found: dict[str, Any] = dict(compare_counts(m, k))
    found["mean_kg"] = np.divide(m.sum_kg * 1e4, m.size_k[:, None], out=np.zeros_like(m.sum_kg),
                                 where=m.size_k[:, None] > 0)  # fmt: skip
    found["notes"] = []
    return found
