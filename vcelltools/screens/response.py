"""Find the responding cells of a perturbation by a mixture of two normals along its direction.

These functions work on arrays; :mod:`vcelltools.screens.responding` reads the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.kernels.pvalues import adjust_bh

MIN_GENES = 5
"""Minimum number of significant genes; with fewer, no cell is classified as responding (as in Mixscape)."""
FDR = 0.05
_ROUNDS, _STEPS, _TOLERANCE = 10, 300, 1e-8
_MIN_SPREAD = 0.3


@dataclass(frozen=True, kw_only=True)
class Response:
    """The response of the cells of one perturbation.

    Attributes
    ----------
    posterior_n, score_n
        (n,) probability that a cell responded, and its score: 0 is the mean of controls, 1 that of responding cells.
    n_genes
        Number of significant genes.
    """

    posterior_n: np.ndarray
    score_n: np.ndarray
    n_genes: int

    @property
    def responds_n(self) -> np.ndarray:
        """(n,) bool: whether the probability is above 1/2."""
        return self.posterior_n > 0.5


def find_genes(a_ng: np.ndarray, c_mg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (g,) bool genes whose means differ, and the (g,) pooled variance.

    The test is Student's t with one variance for both groups, adjusted by Benjamini-Hochberg. With separate variances
    (Welch), a gene without any count in a small group by chance would be highly significant.
    """
    from scipy import stats

    n, m = len(a_ng), len(c_mg)
    va, vc = (x.var(axis=0, dtype=np.float64, ddof=1) for x in (a_ng, c_mg))
    mean = a_ng.mean(axis=0, dtype=np.float64) - c_mg.mean(axis=0, dtype=np.float64)
    pooled = (va * (n - 1) + vc * (m - 1)) / (n + m - 2)
    known = pooled > 0
    p = np.ones(len(mean))
    p[known] = 2 * stats.t.sf(np.abs(mean[known]) / np.sqrt(pooled[known] * (1 / n + 1 / m)), n + m - 2)
    return known & (adjust_bh(p[None])[0] < FDR), pooled


def find_responding(a_ng: np.ndarray, c_mg: np.ndarray) -> Response:
    """Distinguish the cells of a perturbation that responded from those that escaped.

    Parameters
    ----------
    a_ng, c_mg
        log1p expression of the perturbation's cells and of the controls, over the same genes; at least two cells each.

    Notes
    -----
    The method follows Papalexi et al. 2021 (Nature Genetics 53, 322). Every cell is projected onto the difference
    between the means of the perturbed cells and the controls, where each significant gene is divided by its variance.
    The means exclude the cell itself, because every cell would otherwise be drawn to its own group. The projections of
    the perturbed cells and the controls are fitted together by a mixture of two normals, of which that of the controls
    stays fixed. The mean is recomputed over the responding cells until no cell changes its class.
    """
    genes, variance = find_genes(a_ng, c_mg)
    n_genes = int(genes.sum())
    nobody = np.zeros(len(a_ng))
    if n_genes < MIN_GENES:
        return Response(posterior_n=nobody, score_n=nobody.copy(), n_genes=n_genes)
    scale = 1.0 / np.sqrt(variance[genes])
    a, c = (x[:, genes].astype(np.float64) * scale for x in (a_ng, c_mg))
    weight = np.ones(len(a))
    posterior, score = nobody, nobody
    for _ in range(_ROUNDS):
        score, low = _project(a, c, weight)
        posterior, shift = _fit(score, low)
        if not posterior.any():
            break
        score = (score - low.mean()) / shift
        changed = np.any((posterior > 0.5) != (weight > 0.5))
        weight = posterior
        if not changed or np.count_nonzero(weight > 0.5) < 2:
            break
    return Response(posterior_n=posterior, score_n=score, n_genes=n_genes)


def _project(a: np.ndarray, c: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the projections of all cells onto the difference of the means, which exclude the cell itself."""
    total, m = float(weight.sum()), len(c)
    mean_a, mean_c = weight @ a / total, c.mean(axis=0)
    own_a, own_c = np.einsum("ij,ij->i", a, a), np.einsum("ij,ij->i", c, c)
    left = np.maximum(total - weight, 1e-9)
    score = (total * (a @ mean_a) - weight * own_a) / left - a @ mean_c
    low = c @ mean_a - (m * (c @ mean_c) - own_c) / (m - 1)
    return score, low


def _fit(score: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the probability of the second normal for each cell, and the distance of its mean from the first.

    The controls take part, because a second normal that is wide enough for all perturbed cells is then too wide.
    """
    mean0, sd0 = float(low.mean()), float(low.std(ddof=1))
    perturbed = (score - mean0) / sd0
    z = np.concatenate([perturbed, (low - mean0) / sd0])
    mean1, sd1, share = max(float(np.quantile(perturbed, 0.75)), 1.0), 1.0, 0.5 * len(perturbed) / len(z)
    before = -np.inf
    for _ in range(_STEPS):
        a = np.log1p(-share) - 0.5 * z**2
        b = np.log(share) - 0.5 * ((z - mean1) / sd1) ** 2 - np.log(sd1)
        both = np.logaddexp(a, b)
        loglik = float(both.sum())
        if loglik - before <= _TOLERANCE * (1.0 + abs(loglik)):
            break
        before = loglik
        r = np.exp(b - both)
        n1 = float(r.sum())
        share = min(max(n1 / len(z), 1e-6), 1.0 - 1e-6)
        mean1 = float(r @ z) / n1
        sd1 = max(float(np.sqrt(r @ (z - mean1) ** 2 / n1)), _MIN_SPREAD)
    if mean1 <= 0.5 or share <= 1.5 / len(z):  # the second normal coincides with the controls
        return np.zeros(len(perturbed)), 1.0
    # clip to the means, because a wide normal would claim cells beyond the mean of the other
    z = np.clip(perturbed, 0.0, mean1)
    a = np.log1p(-share) - 0.5 * z**2
    b = np.log(share) - 0.5 * ((z - mean1) / sd1) ** 2 - np.log(sd1)
    return np.exp(b - np.logaddexp(a, b)), mean1 * sd0
