"""Welch's test of means of log1p values, with covariates that are fitted on the controls.

Each gene is regressed on the covariates by least squares in the control cells. The effect of a perturbation is the mean
residual of its cells, that is, the difference to the expected mean of controls with the same covariates (Feng et al.
2026, doi 10.1016/j.xgen.2025.101076). Covariates are labels (donor, lane, …), so cells of one combination have the same
expected value, and the test only needs sums over the cells of each combination.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.differential.groupsums import GroupSums
from vcelltools.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Design:
    """Combinations of covariates, and the design matrix.

    Attributes
    ----------
    combination_n
        (n,) int64 combination of every cell; -1 if a covariate is missing.
    x_cq
        (c, q) design matrix: a column of ones, then one column per level of each covariate except its first.
    names
        Names of the columns.
    """

    combination_n: np.ndarray
    x_cq: np.ndarray
    names: list[str]


def make_design(codes: dict[str, tuple[np.ndarray, list[str]]], n: int) -> Design:
    """Return the design of covariates, each given as codes (-1: missing) and levels."""
    if not codes:
        return Design(combination_n=np.zeros(n, np.int64), x_cq=np.ones((1, 1)), names=["intercept"])
    stack = np.column_stack([c for c, _ in codes.values()])
    known = (stack >= 0).all(axis=1)
    found, at = np.unique(stack[known], axis=0, return_inverse=True)
    combination = np.full(n, -1, np.int64)
    combination[known] = at.reshape(-1)
    columns, names = [np.ones(len(found))], ["intercept"]
    for j, (name, (_, levels)) in enumerate(codes.items()):
        for i, level in enumerate(levels[1:], 1):
            columns.append((found[:, j] == i).astype(float))
            names.append(f"{name}={level}")
    return Design(combination_n=combination, x_cq=np.column_stack(columns), names=names)


@dataclass(frozen=True, kw_only=True)
class MeanTest:
    """Mean residuals of groups; rows are groups, columns genes. Ignore the row of the controls.

    Attributes
    ----------
    effect_kg
        Mean residual: the mean of log1p values minus the expected mean.
    expected_kg
        Expected mean of controls with the same covariates.
    t_kg, p_kg
        Welch's t, and its two-sided p, which is 1 if nothing varies.
    """

    effect_kg: np.ndarray
    expected_kg: np.ndarray
    t_kg: np.ndarray
    p_kg: np.ndarray


def compare_residuals(
    sums: GroupSums, group_c: np.ndarray, combination_c: np.ndarray, design: Design, control: int, n_groups: int,
    where: str,
) -> MeanTest:  # fmt: skip
    """Test the mean residual of every group.

    Parameters
    ----------
    sums
        Sums and squares over the cells of each code.
    group_c, combination_c
        The group and the combination of covariates of each code.
    control
        The group on which the covariates are fitted.

    Returns
    -------
    MeanTest
        For the effect x̄ − z̄β, where β is the controls' least-squares fit and z̄ are the group's mean covariates, the
        variance is s²/n + σ² z̄(Z'Z)⁻¹z̄, where s² is the residual variance of the group and σ² that of the controls.
        The degrees of freedom are Satterthwaite's. Without covariates this is Welch's test.

    Raises
    ------
    DataError
        If the controls lack a level that a group has, or do not determine the effects of the covariates.
    """
    from scipy.special import stdtr

    total_cg, square_cg, size_c = sums.sum_kg, sums.square_kg, sums.size_k.astype(np.float64)
    x_cq = design.x_cq[combination_c]
    is_control = group_c == control
    n_c = size_c[is_control].sum()
    used = x_cq[is_control & (size_c > 0)].any(axis=0)
    for i in np.flatnonzero(~used & x_cq[size_c > 0].any(axis=0)):
        raise DataError(
            f"{where}: no control cell has {design.names[i]}, so its effect cannot be estimated",
            hint="remove the cells of this level, or the covariate",
        )
    x_cq = x_cq[:, used]
    weighted = x_cq[is_control] * size_c[is_control, None]
    gram = weighted.T @ x_cq[is_control]
    rank = int(np.linalg.matrix_rank(gram))
    if n_c <= rank:
        raise DataError(f"{where}: {int(n_c)} control cells are too few to fit {rank} columns of covariates")
    inverse = np.linalg.pinv(gram, hermitian=True)
    beta_qg = inverse @ (x_cq[is_control].T @ total_cg[is_control])
    fit_cg = x_cq @ beta_qg
    residual_cg = total_cg - size_c[:, None] * fit_cg
    rest_cg = np.maximum(square_cg - 2 * fit_cg * total_cg + size_c[:, None] * fit_cg**2, 0.0)

    def pool(values: np.ndarray) -> np.ndarray:
        out = np.zeros((n_groups, *values.shape[1:]))
        np.add.at(out, group_c, values)
        return out

    size_k = pool(size_c)
    n = np.maximum(size_k, 1)[:, None]
    effect = pool(residual_cg) / n
    var = np.maximum(pool(rest_cg) / n - effect**2, 0.0) * n / np.maximum(n - 1, 1)
    sigma2 = rest_cg[is_control].sum(axis=0) / (n_c - rank)
    mean_x = pool(x_cq * size_c[:, None]) / n
    leverage = np.einsum("kq,qr,kr->k", mean_x, inverse, mean_x)[:, None]
    a, b = var / n, sigma2 * leverage
    with np.errstate(divide="ignore", invalid="ignore"):
        t = effect / np.sqrt(a + b)
        df = (a + b) ** 2 / (a**2 / np.maximum(n - 1, 1) + b**2 / (n_c - rank))
    tiny = a + b <= 1e-18 * (1 + np.abs(effect))
    t = np.where(tiny, 0.0, t)
    p = np.where(tiny, 1.0, np.minimum(2 * stdtr(np.where(tiny, 1.0, df), -np.abs(t)), 1.0))
    return MeanTest(effect_kg=effect, expected_kg=pool(fit_cg * size_c[:, None]) / n, t_kg=t, p_kg=p)
