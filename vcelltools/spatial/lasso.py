"""Solve a sparse-group lasso to a certificate: coordinate descent finds the support, Newton steps refine it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.kernels.lasso import solve_lasso

SCALES = ("group-size", "none", "inverse-group-size")  # how the penalty of a group depends on its size
_ROUNDS = 60
_NEAR = 100.0  # smaller penalties (in units of the certificate to reach) start from least squares
_FAR, _ROUGH = 0.1, 0.1  # penalties below this share of the largest gradient follow a path; tolerance of the path
_SWEEPS = 2  # minimum number of sweeps of coordinate descent between Newton phases
_CHEAP = 400_000  # minimum number of inner products per descent phase, which suffices for small problems
_NEWTON = 8  # maximum number of steps per Newton phase


def get_group_penalties(group_reg: float, sizes_g: np.ndarray, scale: str) -> np.ndarray:
    """Return (g,) penalties on the norms of the groups, from their numbers of columns."""
    root = np.sqrt(np.maximum(np.asarray(sizes_g, np.float64), 1.0))
    return group_reg * {"group-size": root, "none": np.ones_like(root), "inverse-group-size": 1.0 / root}[scale]


@dataclass(frozen=True)
class Solution:
    """Coefficients (m,), and the certificate: the largest violation of the optimality conditions over max|c|."""

    w: np.ndarray
    kkt: float


def solve(
    gram_mm: np.ndarray,
    c_m: np.ndarray,
    starts_g: np.ndarray,
    *,
    l1: float,
    lam_g: np.ndarray,
    tol: float = 1e-6,
    start_m: np.ndarray | None = None,
) -> Solution:
    """Minimise ``1/2 w'Gw - c'w + l1 |w|_1 + sum_g lam_g |w_g|_2``.

    Parameters
    ----------
    gram_mm, c_m
        Inner products of the centred columns, sorted by group, and of these with the centred target, divided by the
        number of cells; C-contiguous.
    starts_g
        (g + 1,) start of each group.
    tol
        The certificate to reach.
    """
    w = np.zeros(len(c_m)) if start_m is None else np.ascontiguousarray(start_m, np.float64).copy()
    scale = float(np.abs(c_m).max(initial=0.0))
    if scale == 0.0:
        return Solution(np.zeros(len(c_m)), 0.0)
    lam_g = np.ascontiguousarray(lam_g, np.float64)
    target, certificate = tol * scale, np.inf
    if l1 + float(lam_g.max(initial=0.0)) < _NEAR * target:  # nearly least squares
        w = _solve_least_squares(gram_mm, c_m, 0.25 * target)
    elif start_m is None:
        w = _follow(gram_mm, c_m, starts_g, l1, lam_g, scale)
    sweeps = max(_SWEEPS, _CHEAP // len(c_m) ** 2)
    for _ in range(_ROUNDS):
        certificate, _done = solve_lasso(gram_mm, c_m, starts_g, l1, lam_g, w, target, sweeps)
        if certificate <= target:
            break
        _step(gram_mm, c_m, starts_g, l1, lam_g, w)
    return Solution(w, certificate / scale)


def _follow(
    gram: np.ndarray, c: np.ndarray, starts: np.ndarray, l1: float, lam_g: np.ndarray, scale: float
) -> np.ndarray:
    """Return a start for small penalties, from approximate solutions for successively smaller ones."""
    w = np.zeros(len(c))
    factor = 1.0
    while l1 + float(lam_g.max(initial=0.0)) < _FAR * factor * scale and factor > 1e-6:
        factor *= 0.4
        for _ in range(3):
            more = factor * scale
            certificate, _done = solve_lasso(gram, c, starts, l1 + more, lam_g, w, _ROUGH * more, _SWEEPS)
            if certificate <= _ROUGH * more:
                break
            _step(gram, c, starts, l1 + more, lam_g, w)
    return w


def _solve_least_squares(gram: np.ndarray, c: np.ndarray, target: float) -> np.ndarray:
    """Return coefficients whose gradient is below ``target``, by iterative refinement with a small ridge."""
    from scipy.linalg import cho_factor, cho_solve

    ridge = gram.copy()
    np.einsum("ii->i", ridge)[:] += 1e-9 * max(float(np.trace(gram)) / len(gram), 1e-300)
    factor = cho_factor(ridge, lower=True, overwrite_a=True)
    w = np.zeros(len(c))
    for _ in range(20):
        gradient = c - gram @ w
        if np.abs(gradient).max() <= target:
            break
        w += cho_solve(factor, gradient)
    return w


def _step(gram: np.ndarray, c: np.ndarray, starts: np.ndarray, l1: float, lam_g: np.ndarray, w: np.ndarray) -> None:
    """Take projected Newton steps on the non-zero coefficients; those that change their sign become zero.

    Steps that do not lower the objective are rejected.
    """
    from scipy.linalg.lapack import dposv

    group = np.repeat(np.arange(len(lam_g)), np.diff(starts))
    grouped = np.flatnonzero(lam_g > 0)
    for _ in range(_NEWTON):
        at = np.flatnonzero(w)
        if not len(at):
            return
        wa, ga = w[at], group[at]
        sign = np.sign(wa)
        sub, ca = gram[np.ix_(at, at)], c[at]
        norm = np.sqrt(np.bincount(ga, wa * wa, len(lam_g)))
        pull = lam_g[ga] / norm[ga]
        product = sub @ wa
        gradient = ca - product - l1 * sign - pull * wa
        hessian = sub.copy(order="F")
        for g in grouped[norm[grouped] > 0]:
            unit = np.where(ga == g, wa, 0.0) / norm[g]
            hessian -= (lam_g[g] / norm[g]) * np.outer(unit, unit)
        np.einsum("ii->i", hessian)[:] += pull + 1e-11 * max(float(np.trace(sub)) / len(at), 1e-300)
        _, d, info = dposv(hessian, gradient, lower=1, overwrite_a=1)
        if info != 0:
            return
        before = 0.5 * wa @ product - ca @ wa + l1 * np.abs(wa).sum() + lam_g @ norm
        t = 1.0
        for _ in range(30):
            new = wa + t * d
            new[new * sign < 0] = 0.0
            value = 0.5 * new @ (sub @ new) - ca @ new + l1 * np.abs(new).sum()
            if value + lam_g @ np.sqrt(np.bincount(ga, new * new, len(lam_g))) < before:
                break
            t *= 0.5
        else:
            return
        w[at] = new
        if t == 1.0 and np.count_nonzero(new) == len(new) and (not len(grouped) or np.abs(t * d).max() < 1e-6):
            return
