"""Compute the input of the 2026 metrics from counts by gene: log profiles, their sampling variance, and DE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.kernels.pvalues import adjust_bh, asymptotic_p
from vcelltools.scoring.vcc2026.counts import Tables

TARGET_SUM = 50_000.0
"""The sum to which the profile of a group is scaled before log1p."""
MIN_CPM = 5.0
"""Genes stay in the DE table if the mean counts per million of the controls exceed this."""
EPSILON = 1e-9
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class DeTable:
    """Differential expression of every perturbation against the controls, on the genes that passed the filter.

    Attributes
    ----------
    genes
        (h,) positions of the genes in the data.
    lfc_ph, p_ph, padj_ph
        (p, h) float64 log2 fold changes of mean CPM, two-sided p, and p adjusted within the perturbation.
    """

    genes: np.ndarray
    lfc_ph: np.ndarray
    p_ph: np.ndarray
    padj_ph: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """One side of a comparison: k groups, with the controls first and the perturbations in label order.

    Attributes
    ----------
    size_k
        (k,) cells.
    profile_kg
        (k, g) float64, log1p of the group's counts scaled to ``TARGET_SUM``.
    spread_k
        (k,) leave-one-cell-out variance C of the profile, summed over genes.
    de
        The DE table of the perturbations.
    """

    size_k: np.ndarray
    profile_kg: np.ndarray
    spread_k: np.ndarray
    de: DeTable


def make_profiles(tables: Tables, *, continuity: bool) -> Profiles:
    """Return profiles and DE from the tables of one labeling."""
    return Profiles(
        size_k=tables.size_k,
        profile_kg=get_profiles(tables.sum_kg),
        spread_k=tables.spread_k,
        de=make_de(tables, continuity=continuity),
    )


def get_profiles(sum_kg: np.ndarray) -> np.ndarray:
    """Return log1p of each row scaled to ``TARGET_SUM`` counts; an empty row stays zero."""
    total = sum_kg.sum(axis=1)
    scale = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    return np.log1p(sum_kg * scale[:, None])


def make_de(tables: Tables, *, continuity: bool) -> DeTable:
    """Test every perturbation against the controls.

    Parameters
    ----------
    continuity
        Whether the normal approximation uses the continuity correction of one half.
    """
    control = tables.cpm_kg[0]
    genes = np.flatnonzero(control > MIN_CPM)
    n1, n2 = tables.size_k[1:, None], tables.size_k[0]
    p_ph = rank_p(tables.twice_u_kg[1:, genes], tables.tie_kg[1:, genes], n1, n2, continuity=continuity)
    lfc_ph = np.log2((np.ascontiguousarray(tables.cpm_kg[1:, genes]) + EPSILON) / (control[genes] + EPSILON))
    padj_ph = adjust_bh(p_ph)
    padj_ph[np.isnan(lfc_ph)] = 1.0
    return DeTable(genes=genes, lfc_ph=lfc_ph, p_ph=p_ph, padj_ph=padj_ph)


def rank_p(twice_u: np.ndarray, tie: np.ndarray, n1: np.ndarray, n2: float, *, continuity: bool) -> np.ndarray:
    """Return the two-sided p of the rank-sum test by the normal approximation with tie correction.

    Parameters
    ----------
    twice_u
        Twice the U of the group.
    tie
        Σ(t³ − t) over the ties of both groups.
    n1, n2
        Cells of the group and of the controls.
    """
    twice, tie = np.ascontiguousarray(twice_u, np.float64), np.ascontiguousarray(tie, np.float64)
    p = np.empty_like(twice)
    sizes = np.ascontiguousarray(np.broadcast_to(n1, (len(twice), 1))[:, 0], np.float64)
    asymptotic_p(twice / 2.0, tie, sizes, float(n2), 0.5 if continuity else 0.0, p)
    return p
