"""The six metrics of the 2026 rules, as functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.errors import DataError
from vcelltools.scoring.vcc2026.profiles import ALPHA, DeTable, Profiles

PDS = "pds_cosine"
EXPRESSION = "expr_mse_unbiased_capped_norm"
FIDELITY = "de_wilcoxon_direction_fidelity_yield_raw"
REACH = "de_wilcoxon_direction_reach_raw"
JACCARD = "de_wilcoxon_sig_jaccard"
NMAE = "de_wilcoxon_lfc_nmae"
METRICS = (PDS, EXPRESSION, FIDELITY, REACH, JACCARD, NMAE)
LOWER_IS_BETTER = frozenset({EXPRESSION, NMAE})
PURITY = 0.9
MIN_GATE = 10
N_BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True)
class Values:
    """The metrics of a prediction.

    Attributes
    ----------
    per
        Metric → (p,) float64, NaN if undefined; without the expression ratio.
    error_p, distance_p
        (p,) the numerator and denominator of the expression ratio.
    distance_pp
        (p, p) cosine distance of each predicted effect (rows) to each true one.
    """

    per: dict[str, np.ndarray]
    error_p: np.ndarray
    distance_p: np.ndarray
    distance_pp: np.ndarray

    def means(self) -> dict[str, float]:
        """Return the raw value of each metric: the mean over perturbations with a finite value."""
        return {m: self.get_ratio() if m == EXPRESSION else finite_mean(self.per[m]) for m in METRICS}

    def get_ratio(self) -> float:
        """Return the expression error over the distance, both summed over perturbations.

        Raises
        ------
        DataError
            If the sum of the true effects minus their sampling variance is not positive.
        """
        ok = np.isfinite(self.error_p) & np.isfinite(self.distance_p)
        below = float(self.distance_p[ok].sum())
        if not below > 0:
            raise DataError(
                f"the truth shows no effect: the squared distances of the perturbations from the controls, minus their "
                f"sampling variance, sum to {below:.4g}",
                hint="the expression metric needs a truth with measurable effects: use more cells, or other "
                "perturbations",
            )
        return float(self.error_p[ok].sum()) / below

    def counts(self) -> dict[str, int]:
        """Return the number of perturbations in the mean of each metric."""
        ok = np.isfinite(self.error_p) & np.isfinite(self.distance_p)
        return {m: int((ok if m == EXPRESSION else np.isfinite(self.per[m])).sum()) for m in METRICS}


def finite_mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, or NaN if there is none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def compare(real: Profiles, pred: Profiles, target_p: np.ndarray, name_rank_g: np.ndarray) -> Values:
    """Score one side against the other; effects are relative to group 0 of each side.

    Parameters
    ----------
    target_p
        (p,) position of the own gene of each perturbation, or −1.
    name_rank_g
        (g,) rank of the name of each gene, for ties.
    """
    pds_p, distance_pp = get_discrimination(real.profile_kg, pred.profile_kg, target_p)
    error_p, distance_p = get_expression(real, pred, target_p)
    per = {PDS: pds_p, **get_direction(real.de, pred.de, target_p, name_rank_g)}
    per[NMAE] = get_nmae(real.de, align(pred.de, real.de), real.de.lfc_ph, target_p)
    return Values(per=per, error_p=error_p, distance_p=distance_p, distance_pp=distance_pp)


def get_discrimination(real_kg: np.ndarray, pred_kg: np.ndarray, target_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (p,) the fraction of true effects farther from a predicted effect than its own, and the distances."""
    keep = np.ones(real_kg.shape[1], bool)
    keep[target_p[target_p >= 0]] = False
    if not keep.any():
        raise DataError("every gene is the target of a perturbation, so no gene is left to distinguish perturbations")
    real = (real_kg[1:] - real_kg[0])[:, keep]
    pred = (pred_kg[1:] - pred_kg[0])[:, keep]
    dot = pred @ real.T
    norm = np.sqrt(np.einsum("ig,ig->i", pred, pred))[:, None] * np.sqrt(np.einsum("jg,jg->j", real, real))[None, :]
    cosine = np.divide(dot, norm, out=np.zeros_like(dot), where=norm != 0)
    distance = np.clip(1.0 - cosine, 0.0, 2.0)
    own = np.diagonal(distance)[:, None]
    rank = (distance < own).sum(axis=1) + ((distance == own).sum(axis=1) - 1) / 2.0
    n = len(distance)
    return (1.0 - rank / (n - 1) if n > 1 else np.ones(n)), distance


def get_expression(real: Profiles, pred: Profiles, target_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (p,) N and D: the squared error of the profile and the true effect, both minus sampling variance."""
    truth, guess = real.profile_kg[1:], pred.profile_kg[1:]
    n_genes = truth.shape[1]
    row = np.flatnonzero(target_p >= 0)
    col = target_p[row]
    n_scored = np.full(len(truth), float(n_genes))
    n_scored[row] -= 1.0
    weight = np.divide(1.0, n_scored, out=np.zeros_like(n_scored), where=n_scored > 0)
    claim = np.minimum(pred.spread_k[1:], real.spread_k[1:])
    total_claim = float((claim * weight).sum())
    budget = get_budget(guess, row, col, weight)
    share = min(1.0, budget / total_claim) if total_claim > 0 else 1.0
    error = _squared(guess - truth, row, col) - share * claim - real.spread_k[1:]
    effect = _squared(truth - real.profile_kg[0], row, col) - real.spread_k[1:] - real.spread_k[0]
    nothing = n_scored == 0
    return np.where(nothing, np.nan, error * weight), np.where(nothing, np.nan, effect * weight)


def _squared(gap_pg: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    out = np.einsum("pg,pg->p", gap_pg, gap_pg)
    out[row] -= gap_pg[row, col] ** 2
    return out


def get_budget(guess_pg: np.ndarray, row: np.ndarray, col: np.ndarray, weight_p: np.ndarray) -> float:
    """Return the weighted sum of squares of the profiles around their mean over perturbations, without own genes."""
    gap = guess_pg - guess_pg.mean(axis=0)
    s1 = weight_p @ gap
    s2 = np.einsum("pg,pg,p->g", gap, gap, weight_p)
    mass = np.full(guess_pg.shape[1], weight_p.sum())
    n = np.full(guess_pg.shape[1], float(len(guess_pg)))
    own = gap[row, col]
    np.subtract.at(s1, col, weight_p[row] * own)
    np.subtract.at(s2, col, weight_p[row] * own * own)
    np.subtract.at(mass, col, weight_p[row])
    np.subtract.at(n, col, 1.0)
    ok = (n >= 2) & (mass > 0)
    return float(np.maximum(s2[ok] - s1[ok] ** 2 / mass[ok], 0.0).sum())


def align(table: DeTable, like: DeTable) -> np.ndarray:
    """Return the log2 fold changes of the table for the genes of ``like``; 0 if missing or not finite."""
    if np.array_equal(table.genes, like.genes):
        out = table.lfc_ph.copy()
    else:
        out = np.zeros_like(like.lfc_ph)
        _, mine, theirs = np.intersect1d(table.genes, like.genes, assume_unique=True, return_indices=True)
        out[:, theirs] = table.lfc_ph[:, mine]
    out[~np.isfinite(out)] = 0.0
    return out


def get_significant(table: DeTable, target_p: np.ndarray) -> np.ndarray:
    """Return (p, h) bool: significant genes without the own gene of each perturbation."""
    out = table.padj_ph < ALPHA
    out[table.genes[None, :] == target_p[:, None]] = False
    return out


def get_nmae(real: DeTable, guess_ph: np.ndarray, against_ph: np.ndarray, target_p: np.ndarray) -> np.ndarray:
    """Return (p,) the error of log2 fold changes over truly significant genes, relative to the true fold changes.

    ``against_ph`` are the true fold changes or, for the replicate, those of the other half of the cells.
    """
    gate = get_significant(real, target_p) & np.isfinite(real.lfc_ph)
    size = np.where(gate, np.abs(real.lfc_ph), 0.0).sum(axis=1)
    error = np.where(gate, np.abs(guess_ph - against_ph), 0.0).sum(axis=1)
    ok = (gate.sum(axis=1) >= MIN_GATE) & (size > 0) & np.isfinite(size)
    return np.divide(error, size, out=np.full(len(size), np.nan), where=ok)


def get_direction(real: DeTable, pred: DeTable, target_p: np.ndarray, name_rank_g: np.ndarray) -> dict[str, np.ndarray]:
    """Return the fidelity, the reach and the Jaccard index of every perturbation."""
    real_sig, pred_sig = get_significant(real, target_p), get_significant(pred, target_p)
    _, in_real, in_pred = np.intersect1d(real.genes, pred.genes, assume_unique=True, return_indices=True)
    genes = real.genes[in_real]
    truth, guess = real.lfc_ph[:, in_real], pred.lfc_ph[:, in_pred]
    judged = ~np.isnan(truth) & (truth != 0)
    match = judged & ~np.isnan(guess) & (guess != 0) & (np.sign(truth) == np.sign(guess))
    called, known = pred_sig[:, in_pred], real_sig[:, in_real]
    n_real = real_sig.sum(axis=1)
    calls = (called & judged).sum(axis=1)
    hits = (called & match).sum(axis=1)
    most = np.maximum(calls, n_real)
    fidelity = np.divide(hits, most, out=np.full(len(most), np.nan), where=most > 0)

    reach = np.full(len(n_real), np.nan)
    p, padj = pred.p_ph[:, in_pred], pred.padj_ph[:, in_pred]
    rank = name_rank_g[genes]
    for i in np.flatnonzero(n_real > 0):
        at = np.flatnonzero(known[i])
        size = np.abs(guess[i, at])
        keys = (rank[at], -np.where(np.isnan(size), -np.inf, size), _last(p[i, at]), _last(padj[i, at]))
        order = at[np.lexsort((*keys, ~(padj[i, at] < ALPHA)))]
        depth = np.cumsum(judged[i, order])
        good = np.cumsum(match[i, order])
        pure = (depth > 0) & (good / np.maximum(depth, 1) >= PURITY)
        reach[i] = (depth[pure].max() if pure.any() else 0) / n_real[i]

    both = (called & known).sum(axis=1)
    union = n_real + pred_sig.sum(axis=1) - both
    jaccard = np.divide(both, union, out=np.ones(len(union)), where=union > 0)
    return {FIDELITY: fidelity, REACH: reach, JACCARD: jaccard}


def _last(p: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(p), np.inf, p)


def get_interval(values: Values, metric: str) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the raw value of a metric over perturbations."""
    if metric == EXPRESSION:
        ok = np.isfinite(values.error_p) & np.isfinite(values.distance_p)
        above, below = values.error_p[ok], values.distance_p[ok]
    else:
        above = values.per[metric][np.isfinite(values.per[metric])]
        below = np.ones(len(above))
    if len(above) < 2:
        return float("nan"), float("nan")
    pick = np.random.default_rng(0).integers(0, len(above), (N_BOOTSTRAP, len(above)))
    under = below[pick].sum(axis=1)
    drawn = np.divide(above[pick].sum(axis=1), under, out=np.full(N_BOOTSTRAP, np.nan), where=under > 0)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < N_BOOTSTRAP // 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
