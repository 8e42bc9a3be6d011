"""Compute a differential expression table from sums and ranks: means, fold changes, p-values, adjusted p-values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.differential.de import adjust_kept
from vcelltools.differential.reduce import Reduced
from vcelltools.io.frame import arrow_numbers
from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.kernels.transform import expm1_flat
from vcelltools.scoring.cell_eval.rules import Rules
from vcelltools.scoring.tables import Columns, texts

if TYPE_CHECKING:
    import pyarrow as pa

ALPHA = 0.05
"""Adjusted p below which a gene is significant."""


@dataclass(frozen=True, kw_only=True)
class DeTable:
    """Every perturbation against the controls; rows are perturbations (without the control), columns genes.

    Attributes
    ----------
    names
        Perturbations, sorted as text.
    mean_pg, control_mean_g
        Means in natural units, expm1 of the mean of log1p.
    log2fc_pg, percent_pg
        log2((m + ε)/(m_c + ε)) and (m − m_c)/(m_c + ε).
    ratio_pg
        Fold changes, if the rule set uses them.
    u_pg, p_pg, fdr_pg
        Mann-Whitney U of the perturbation, its p-value, and the adjusted one (NaN for filtered genes).
    significant_pg
        Adjusted p < 0.05, compared in float32.
    keep_pg
        Genes that passed the CPM filter, or None without a filter.
    """

    names: list[str]
    mean_pg: np.ndarray
    control_mean_g: np.ndarray
    log2fc_pg: np.ndarray
    percent_pg: np.ndarray
    ratio_pg: np.ndarray | None
    u_pg: np.ndarray
    p_pg: np.ndarray
    fdr_pg: np.ndarray
    significant_pg: np.ndarray
    keep_pg: np.ndarray | None


def make_de_table(
    side: Reduced, rules: Rules, *, epsilon: float = 0.0, cpm_filter: float | None = None, discrete: bool = False
) -> DeTable:
    """Compute the table of one side.

    Parameters
    ----------
    epsilon
        Added to both means before the fold change.
    cpm_filter
        Genes whose pooled counts per million are at most this in both groups are dropped before the adjustment.
    discrete
        Whether the values are discrete counts, whose means are of log1p.
    """
    sums = side.sums
    assert sums.u_kg is not None
    assert sums.p_kg is not None
    perts = side.perts
    log_kg = _log_means(side, rules, discrete)
    if discrete and rules.fold_limit is not None and side.scale.kind == "counts":
        # pdex 0.1 averages unchanged counts
        mean_kg = log_kg
    elif rules.fold_limit is not None:  # and uses numpy's expm1; the others use that of the C library
        mean_kg = np.expm1(log_kg)
    else:
        mean_kg = np.empty_like(log_kg)
        expm1_flat(log_kg.reshape(-1), mean_kg.reshape(-1))
    target, control = mean_kg[perts], mean_kg[side.control]
    ratio = None
    with np.errstate(divide="ignore", invalid="ignore"):
        if rules.fold_limit is None:
            log2fc = np.log2((target.astype(np.float64) + epsilon) / (control.astype(np.float64) + epsilon))
            log2fc[np.isnan(log2fc)] = 0.0
            percent = (target.astype(np.float64) - control) / (control.astype(np.float64) + epsilon)
            percent[np.isnan(percent)] = 0.0
        else:
            ratio = target / control
            ratio[:, control == 0] = rules.fold_limit
            ratio[target == 0] = 1 / rules.fold_limit
            ratio[(target == 0) & (control == 0)] = 1.0
            log2fc = np.log2(ratio)
            percent = np.where(control == 0, np.nan, (target - control) / control)
    p = sums.p_kg[perts]
    if rules.exact_p and side.dtype == np.float32:  # SciPy computes this in the precision of the values
        p = p.astype(np.float32).astype(np.float64)
    keep = _get_kept(side, cpm_filter, discrete) if cpm_filter is not None else None
    fdr = adjust_bh(p.ravel()).reshape(p.shape) if rules.global_bh else adjust_kept(p, keep)
    return DeTable(
        names=side.names,
        mean_pg=target,
        control_mean_g=control,
        log2fc_pg=log2fc,
        percent_pg=percent,
        ratio_pg=ratio,
        u_pg=sums.u_kg[perts],
        p_pg=p,
        fdr_pg=fdr,
        significant_pg=fdr.astype(np.float32) < np.float32(ALPHA),
        keep_pg=keep,
    )


def _log_means(side: Reduced, rules: Rules, discrete: bool) -> np.ndarray:
    """Return (k, g) means of log1p values (or of discrete counts under the 2025 rules) in the rule set's precision."""
    sums = side.sums
    size = np.maximum(sums.size_k, 1)[:, None]
    if rules.fold_limit is not None and sums.single_kg is not None:
        return sums.single_kg / size.astype(sums.single_kg.dtype)
    if discrete and rules.fold_limit is None:
        assert sums.moment_kg is not None
        return sums.moment_kg / size
    if sums.single_kg is not None and rules.peer_precision:
        return sums.single_kg if side.sparse else sums.single_kg / size.astype(sums.single_kg.dtype)
    return (sums.sum_kg / size).astype(side.dtype if rules.peer_precision else np.float64)


def _get_kept(side: Reduced, threshold: float, discrete: bool) -> np.ndarray:
    """Return (p, g) bool: pooled counts per million above the threshold in the perturbation or in the controls."""
    sums = side.sums
    natural = sums.sum_kg if discrete else sums.moment_kg
    assert natural is not None
    total = natural.sum(axis=1, keepdims=True)
    cpm = natural / np.where(total > 0, total, 1.0) * 1e6
    return (cpm[side.perts] > threshold) | (cpm[side.control] > threshold)


def get_columns(
    table: DeTable, reduced: Reduced, order: tuple[str, ...], control: str
) -> tuple[Columns, int, list[str]]:
    """Return the columns of ``pred_de.csv`` or ``real_de.csv``, their length, and the texts in them.

    Perturbations are in ``order``, genes in the order of the file; the columns are those of pdex 0.3, or of 0.1 if the
    rule set uses fold changes.
    """
    position = {n: i for i, n in enumerate(table.names)}
    rows = np.array([position[n] for n in order if n in position], np.int64)
    keep = None if table.keep_pg is None else table.keep_pg[rows].ravel()
    n_g = len(reduced.genes)
    sizes = dict(zip(reduced.labels, reduced.sums.size_k.tolist(), strict=True))
    names = [table.names[i] for i in rows]
    features = [str(g) for g in reduced.genes]
    kind = np.float32 if reduced.dtype == np.float32 else np.float64

    def flat(x: np.ndarray, nan_is_null: bool = False) -> pa.Array:
        values = np.ascontiguousarray(x[rows]).ravel()
        return arrow_numbers(values if keep is None else values[keep], nan_is_null)

    def repeated(values: pa.Array) -> pa.Array:
        index = np.repeat(np.arange(len(values), dtype=np.int32), n_g)
        return values.take(arrow_numbers(index if keep is None else index[keep]))

    def tiled(values: pa.Array) -> pa.Array:
        index = np.tile(np.arange(len(values), dtype=np.int32), len(rows))
        return values.take(arrow_numbers(index if keep is None else index[keep]))

    columns: dict[str, pa.Array] = {"target": repeated(texts(names))}
    means = {
        "target_mean": flat(table.mean_pg.astype(kind)),
        ("reference_mean" if table.ratio_pg is not None else "ref_mean"): tiled(
            arrow_numbers(table.control_mean_g.astype(kind))
        ),
    }
    if table.ratio_pg is not None:
        columns |= {"reference": repeated(texts([control] * len(rows))), "feature": tiled(texts(features)), **means}
        columns |= {"percent_change": flat(table.percent_pg, True), "fold_change": flat(table.ratio_pg)}
        columns |= {"p_value": flat(table.p_pg), "statistic": flat(table.u_pg), "fdr": flat(table.fdr_pg)}
    else:
        columns |= {"feature": tiled(texts(features)), **means}
        columns["target_membership"] = repeated(arrow_numbers(np.array([sizes[n] for n in names], np.int64)))
        columns["ref_membership"] = repeated(arrow_numbers(np.full(len(rows), sizes[control], np.int64)))
        columns |= {"log2_fold_change": flat(table.log2fc_pg), "percent_change": flat(table.percent_pg)}
        columns |= {"p_value": flat(table.p_pg), "statistic": flat(table.u_pg), "fdr": flat(table.fdr_pg)}
    return columns, len(rows) * n_g if keep is None else len(keep[keep]), [*names, *features, control]
