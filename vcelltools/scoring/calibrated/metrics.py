"""The metrics of the profile ``calibrated``, on pseudobulks of perturbations × genes.

Definitions and edge cases are those of scPertEval (Schäfer et al. 2026, doi 10.64898/2026.07.23.740433; version 0.2.0,
MIT) for metrics with the same name. Undefined values are NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vcelltools.runtime.threads import one_blas_thread, share_work
from vcelltools.scoring.calibrated.moments import Welch, get_weights
from vcelltools.scoring.cell_eval.metrics import Hits, count_hits, get_area

ALPHA = 0.05
"""Genes with an adjusted p below this value are differentially expressed."""
TOP_GENES = 50


@dataclass(frozen=True, kw_only=True)
class View:
    """The truth to compare profiles with; rows are perturbations, columns genes.

    Attributes
    ----------
    mean_pg
        Mean expression of the true cells.
    control_g
        Mean of the controls.
    others_pg
        Mean over the means of all other perturbations.
    effects
        Test of every perturbation against all other perturbed cells.
    """

    mean_pg: np.ndarray
    control_g: np.ndarray
    others_pg: np.ndarray
    effects: Welch


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A profile to compare with the truth.

    Attributes
    ----------
    mean_pg
        (p, g) mean expression.
    strength_pg
        (p, g) abs(t), by which genes are ranked.
    """

    mean_pg: np.ndarray
    strength_pg: np.ndarray


def compute_metrics(
    view: View, candidates: dict[str, Candidate], wanted: dict[str, tuple[str, ...]], threads: int = 1
) -> dict[str, dict[str, np.ndarray]]:
    """Return {candidate: {metric: (p,) values}}; ``wanted`` lists the metrics of each candidate."""
    n = len(view.mean_pg)
    out = {c: {m: np.full(n, np.nan) for m in names} for c, names in wanted.items()}

    def compute(p: int) -> None:
        frame = _Frame(view, p)
        for c, names in wanted.items():
            x, ranking = candidates[c].mean_pg[p], _Ranking(frame, candidates[c].strength_pg[p])
            for m in names:
                if m in _PROFILES:
                    out[c][m][p] = _PROFILES[m](frame, x)
                elif m in _RANKINGS:
                    out[c][m][p] = _RANKINGS[m](ranking)

    share_work(range(n), [compute] * threads)
    for c, names in wanted.items():
        if retrieval := [m for m in names if m in _RETRIEVAL]:
            rank_p = rank_own(candidates[c].mean_pg, view.mean_pg)
            for m in retrieval:
                out[c][m] = _RETRIEVAL[m](rank_p)
    return out


class _Frame:
    """The truth of one perturbation."""

    def __init__(self, view: View, p: int) -> None:
        self.y, self.control, self.others = view.mean_pg[p], view.control_g, view.others_pg[p]
        self.t = view.effects.t_pg[p]
        self.de = view.effects.padj_pg[p] < ALPHA
        self.top = get_top(np.abs(self.t))
        self.w = get_weights(self.t)


def _r2(y: np.ndarray, x: np.ndarray, w: np.ndarray | None = None) -> float:
    w = np.full(len(y), 1.0 / len(y)) if w is None else w
    total = float(np.sum(w * (y - np.sum(w * y)) ** 2))
    return 1 - float(np.sum(w * (y - x) ** 2)) / total if total > 0 else float("nan")


def _weighted_pearson(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    dy, dx = y - np.sum(w * y), x - np.sum(w * x)
    scale = float(np.sum(w * dy * dy) * np.sum(w * dx * dx))
    return float(np.sum(w * dy * dx) / np.sqrt(scale)) if scale > 0 else float("nan")


def _pearson(y: np.ndarray, x: np.ndarray) -> float:
    dy, dx = y - y.mean(), x - x.mean()
    scale = float(np.sum(dy * dy) * np.sum(dx * dx))
    # constants are checked exactly, because rounding of the mean leaves a small variance
    if not scale > 0 or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    return float(np.clip(np.sum(dy * dx) / np.sqrt(scale), -1, 1))


def _mean_or_nan(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


_PROFILES: dict[str, Callable[[_Frame, np.ndarray], float]] = {
    "mse": lambda f, x: float(np.mean((f.y - x) ** 2)),
    "pearson_ctrl": lambda f, x: _pearson(f.y - f.control, x - f.control),
    "pearson_pert": lambda f, x: _pearson(f.y - f.others, x - f.others),
    "weighted_pearson_ctrl_exp2": lambda f, x: _weighted_pearson(f.y - f.control, x - f.control, f.w),
    "weighted_pearson_pert_exp2": lambda f, x: _weighted_pearson(f.y - f.others, x - f.others, f.w),
    "r2_ctrl": lambda f, x: _r2(f.y - f.control, x - f.control),
    "r2_pert": lambda f, x: _r2(f.y - f.others, x - f.others),
    "weighted_r2_ctrl_exp2": lambda f, x: _r2(f.y - f.control, x - f.control, f.w),
    "weighted_r2_pert_exp2": lambda f, x: _r2(f.y - f.others, x - f.others, f.w),
    "wmse_exp2": lambda f, x: float(np.sum(f.w * (f.y - x) ** 2)),
    "mse_degs": lambda f, x: _mean_or_nan((f.y - x)[f.de] ** 2),
    "mae_degs": lambda f, x: _mean_or_nan(np.abs(f.y - x)[f.de]),
}


# ---- which genes change ----


def get_top(strength: np.ndarray) -> np.ndarray:
    """Return (g,) bool: the 50 largest values, ties in gene order; none if there are at most 50 genes."""
    top = np.zeros(len(strength), bool)
    if len(strength) > TOP_GENES:
        least = np.partition(strength, -TOP_GENES)[-TOP_GENES]
        top = strength > least
        ties = np.flatnonzero(strength == least)
        top[ties[: TOP_GENES - int(top.sum())]] = True
    return top


class _Ranking:
    """The genes of one perturbation by their strength in a candidate, which are sorted once."""

    def __init__(self, frame: _Frame, strength: np.ndarray) -> None:
        self.frame, self.strength = frame, strength

    @cached_property
    def hits(self) -> Hits | None:
        """The numbers of DE genes among the strongest."""
        return count_hits(self.frame.de, self.strength)

    def get_overlap(self) -> float:
        """Return the share of the 50 strongest genes that are among the truth's."""
        top = self.frame.top
        return float((top & get_top(self.strength)).sum() / TOP_GENES) if top.any() else float("nan")


_RANKINGS: dict[str, Callable[[_Ranking], float]] = {
    "de_auprc": lambda r: get_area(r.hits, "pr"),
    "de_auroc": lambda r: get_area(r.hits, "roc"),
    "de_overlap_50": _Ranking.get_overlap,
}


# ---- retrieval ----


@one_blas_thread()
def rank_own(pred_pg: np.ndarray, real_pg: np.ndarray) -> np.ndarray:
    """Return (p, 3): numbers of truths nearer to each prediction than its own, of equally near ones, and of all others.

    The distance is Euclidean, over all genes.
    """
    a, b = np.einsum("ij,ij->i", pred_pg, pred_pg), np.einsum("ij,ij->i", real_pg, real_pg)
    squared = np.maximum(a[:, None] + b[None, :] - 2.0 * (pred_pg @ real_pg.T), 0.0)
    own = np.diagonal(squared)[:, None]
    n = len(squared)
    return np.column_stack([(squared < own).sum(axis=1), (squared == own).sum(axis=1) - 1, np.full(n, n - 1)])


def _share_behind(rank_p: np.ndarray) -> np.ndarray:
    nearer, tied, others = rank_p.T
    return np.where(others > 0, 1 - (nearer + tied / 2) / np.maximum(others, 1), np.nan)


def _strictly_behind(rank_p: np.ndarray) -> np.ndarray:
    nearer, tied, others = rank_p.T
    return np.where(others > 0, 1 - (nearer + tied) / np.maximum(others, 1), np.nan)


def _top(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the probability that the own truth is among the ``k`` nearest; undefined if there are at most ``k``."""

    def share(rank_p: np.ndarray) -> np.ndarray:
        nearer, tied, others = rank_p.T
        return np.where(others >= k, np.clip((k - nearer) / (tied + 1), 0, 1), np.nan)

    return share


_RETRIEVAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nir": _share_behind,
    "centroid_accuracy": _strictly_behind,
    "reciprocal_rank": lambda r: np.where(r[:, 2] > 0, 1 / (1 + r[:, 0] + r[:, 1] / 2), np.nan),
    "top_1": _top(1),
    "top_5": _top(5),
    "top_10": _top(10),
}

NEGATIVES: dict[str, str] = {
    **dict.fromkeys(_PROFILES, "others"),
    # these metrics subtract the mean of the other perturbations, so the controls are used instead
    **dict.fromkeys((m for m in _PROFILES if "_pert" in m), "control"),
    **dict.fromkeys(_RETRIEVAL, "everything"),
    **dict.fromkeys(_RANKINGS, "reference"),
}
"""Each metric's negative control; see :mod:`vcelltools.scoring.calibrated.controls`."""
