"""From sums and ranks to a differential expression table: means, fold changes, p-values, adjusted p-values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.kernels.transform import expm1_flat
from vcelltools.scoring.compat import Rules
from vcelltools.scoring.sides import Side

ALPHA = 0.05
"""Adjusted p below which a gene is significant."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Every perturbation against the controls; rows are perturbations (the control left out), columns genes.

    Attributes
    ----------
    names
        Perturbations, sorted as text.
    mean_pg, control_mean_g
        Means in natural units: expm1 of the mean of log1p.
    log2fc_pg, percent_pg
        log2((m + ε)/(m_c + ε)) and (m − m_c)/(m_c + ε).
    ratio_pg
        Fold changes, where the rule set works with them.
    u_pg, p_pg, fdr_pg
        Mann-Whitney U of the perturbation, its p-value, and the adjusted one (NaN for filtered genes).
    significant_pg
        Adjusted p < 0.05, compared in float32.
    keep_pg
        Genes that passed the CPM filter, or None where there was none.
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


def make_effects(
    side: Side, rules: Rules, *, epsilon: float = 0.0, cpm_filter: float | None = None, discrete: bool = False
) -> Effects:
    """Derive the table of one side.

    Parameters
    ----------
    epsilon
        Added to both means before the fold change.
    cpm_filter
        Genes whose pooled counts per million are at most this in both groups leave before the adjustment.
    discrete
        The values were left as they are, and means are of their log1p.
    """
    sums = side.sums
    assert sums.u_kg is not None
    assert sums.p_kg is not None
    perts = side.perts
    log_kg = _log_means(side, rules, discrete)
    if discrete and rules.fold_limit is not None and side.scale == "counts":  # pdex 0.1 averages counts as they are
        mean_kg = log_kg
    elif rules.fold_limit is not None:  # and takes numpy's expm1, the others the C library's
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
    if rules.exact_p and side.dtype == np.float32:  # SciPy's precision there is that of the values
        p = p.astype(np.float32).astype(np.float64)
    keep = _get_kept(side, cpm_filter, discrete) if cpm_filter is not None else None
    fdr = np.full_like(p, np.nan)
    if rules.global_bh:
        fdr[...] = adjust_bh(p.ravel()).reshape(p.shape)
    elif keep is None:
        fdr[...] = adjust_bh(p)
    else:
        for i in range(len(p)):
            if keep[i].any():
                fdr[i, keep[i]] = adjust_bh(p[i, keep[i]])
    return Effects(
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


def _log_means(side: Side, rules: Rules, discrete: bool) -> np.ndarray:
    """Return (k, g) means of log1p values (of discrete counts by the rules of 2025) in the rule set's precision."""
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


def _get_kept(side: Side, threshold: float, discrete: bool) -> np.ndarray:
    """Return (p, g): pooled counts per million above the threshold in the perturbation or in the controls."""
    sums = side.sums
    natural = sums.sum_kg if discrete else sums.moment_kg
    assert natural is not None
    total = natural.sum(axis=1, keepdims=True)
    cpm = natural / np.where(total > 0, total, 1.0) * 1e6
    return (cpm[side.perts] > threshold) | (cpm[side.control] > threshold)
