"""Negative binomial regression of samples (pseudobulks of replicates) on covariates, for all genes at once.

The model is log E y = log s + x β with variance μ + α μ², where s is the total count of the sample. α of each gene is
estimated by the method of moments and pooled over perturbations, each of which is fitted together with the controls by
a Poisson regression. The score test of a perturbation's coefficient does not need its estimate, so a perturbation
without any count has a p-value too. p-values come from Student's t distribution with the residual degrees of freedom.

Tests compare the results with ``statsmodels.genmod.GLM.score_test`` with the same α.
"""

from __future__ import annotations

import numpy as np

_STEPS = 50
_TOLERANCE = 1e-9


def fit_counts(y_sg: np.ndarray, size_s: np.ndarray, x_sq: np.ndarray, alpha_g: np.ndarray) -> np.ndarray:
    """Return (s, g) fitted means, by iteratively reweighted least squares; zero for a gene without counts."""
    some = y_sg.sum(axis=0) > 0
    y, alpha = y_sg[:, some], alpha_g[some]
    offset = np.log(size_s)[:, None]
    mu = size_s[:, None] * (y + 0.1 * y.mean(axis=0) + 1e-8) / (size_s[:, None] * 1.1)
    eta = np.log(mu)
    ridge = 1e-12 * np.eye(x_sq.shape[1])
    for _ in range(_STEPS):
        w = mu / (1 + alpha * mu)
        z = eta - offset + (y - mu) / mu
        gram = np.einsum("sq,sg,sr->gqr", x_sq, w, x_sq, optimize=True)
        gram += ridge * (1 + np.trace(gram, axis1=1, axis2=2))[:, None, None]
        beta = np.linalg.solve(gram, np.einsum("sq,sg->gq", x_sq, w * z)[:, :, None])[:, :, 0]
        new = np.clip(offset + x_sq @ beta.T, -30, 30)
        done = np.abs(new - eta).max(initial=0) < _TOLERANCE
        eta = new
        mu = np.exp(eta)
        if done:
            break
    out = np.zeros_like(y_sg, dtype=np.float64)
    out[:, some] = mu
    return out


def estimate_alpha(
    y_sg: np.ndarray, size_s: np.ndarray, group_s: np.ndarray, x_sq: np.ndarray, control: int
) -> np.ndarray:
    """Return (g,) dispersions by the method of moments: Σ((y − μ)² n/(n − q) − μ) / Σμ² over all fits, at least 0."""
    over, scale = np.zeros(y_sg.shape[1]), np.zeros(y_sg.shape[1])
    for k in np.unique(group_s):
        if k == control:
            continue
        rows = (group_s == control) | (group_s == k)
        x = _drop_dependent(np.column_stack([x_sq[rows], group_s[rows] == k]).astype(np.float64))
        n, q = x.shape
        if n <= q:
            continue
        y = y_sg[rows]
        mu = fit_counts(y, size_s[rows], x, np.zeros(y.shape[1]))
        over += ((y - mu) ** 2 * n / (n - q) - mu).sum(axis=0)
        scale += (mu**2).sum(axis=0)
    return np.maximum(np.divide(over, scale, out=np.zeros_like(over), where=scale > 0), 0.0)


def score_group(
    y_sg: np.ndarray, size_s: np.ndarray, is_group_s: np.ndarray, x_sq: np.ndarray, alpha_g: np.ndarray
) -> np.ndarray:
    """Return (g,) z of the score test of a group's coefficient, given ``x_sq``; NaN if ``x_sq`` explains the group."""
    mu = fit_counts(y_sg, size_s, x_sq, alpha_g)
    w = mu / (1 + alpha_g * mu)
    d = is_group_s.astype(np.float64)
    score = (d[:, None] * (y_sg - mu) / (1 + alpha_g * mu)).sum(axis=0)
    gram = np.einsum("sq,sg,sr->gqr", x_sq, w, x_sq, optimize=True)
    cross = np.einsum("s,sg,sq->gq", d, w, x_sq, optimize=True)
    own = np.einsum("s,sg->g", d, w)
    explained = np.einsum("gq,gqr,gr->g", cross, np.linalg.pinv(gram, hermitian=True), cross, optimize=True)
    left = own - explained
    return np.divide(score, np.sqrt(np.maximum(left, 0)), out=np.full(len(own), np.nan), where=left > 1e-9 * own)


def widen(p: np.ndarray, df: float) -> np.ndarray:
    """Convert two-sided normal p-values to those of Student's t, because the estimated dispersion is uncertain."""
    from scipy.special import ndtri, stdtr

    return np.minimum(2 * stdtr(max(df, 1.0), ndtri(np.clip(p, 1e-300, 1) / 2)), 1.0)


def _drop_dependent(x_sq: np.ndarray) -> np.ndarray:
    """Return the columns that are not linear combinations of earlier ones."""
    kept: list[int] = []
    for q in range(x_sq.shape[1]):
        if np.linalg.matrix_rank(x_sq[:, [*kept, q]]) > len(kept):
            kept.append(q)
    return x_sq[:, kept]


def compare_samples(
    y_sg: np.ndarray, size_s: np.ndarray, group_s: np.ndarray, x_sq: np.ndarray, control: int, n_groups: int
) -> dict[str, np.ndarray]:
    """Test every group of samples against the controls, given the covariates ``x_sq`` (including a column of ones).

    Returns
    -------
    dict
        ``p_kg``, ``statistic_kg`` (z of the score test), ``dispersion_g``. p is NaN for a group that the covariates
        explain, for example if all its samples are in a batch without controls.
    """
    from scipy.special import ndtr

    some = size_s > 0
    y_sg, size_s, group_s, x_sq = y_sg[some], size_s[some], group_s[some], x_sq[some]
    alpha = estimate_alpha(y_sg, size_s, group_s, x_sq, control)
    z = np.full((n_groups, y_sg.shape[1]), np.nan)
    for k in range(n_groups):
        rows = (group_s == control) | (group_s == k)
        if k == control or not (group_s == k).any():
            continue
        x = x_sq[rows]
        # drop levels that none of these samples has
        x = _drop_dependent(x[:, x.any(axis=0)])
        z[k] = score_group(y_sg[rows], size_s[rows], group_s[rows] == k, x, alpha)
        nothing = y_sg[rows].sum(axis=0) == 0
        if np.isnan(z[k][~nothing]).all() and (~nothing).any():
            continue
        z[k] = np.where(nothing | np.isnan(z[k]), 0.0, z[k])
    df = len(y_sg) - len(np.unique(group_s)) - np.linalg.matrix_rank(x_sq) + 1
    return {"p_kg": widen(2 * ndtr(-np.abs(z)), df), "statistic_kg": z, "dispersion_g": alpha}
