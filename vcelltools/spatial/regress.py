"""The regressions of one cluster: choose penalties, fit models, and measure R² on held-out cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vcelltools.spatial.blocks import Fold
from vcelltools.spatial.design import Columns, Moments, measure, pick
from vcelltools.spatial.lasso import get_group_penalties, solve
from vcelltools.spatial.modulators import KINDS, TF
from vcelltools.spatial.settings import Settings

_PATH = np.geomspace(1.0, 0.01, 12)  # in units of the smallest penalty at which every coefficient is 0


@dataclass(frozen=True)
class Penalty:
    """Penalties on the coefficients and on the norms of the groups, before scaling by the group size."""

    l1: float
    group: float


@dataclass(frozen=True)
class Fitted:
    """The model of one target: intercept and coefficients of the raw columns."""

    intercept: float
    cols: np.ndarray
    w: np.ndarray
    kkt: float

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the predictions of (b, p) columns."""
        at = np.flatnonzero(self.w)
        return self.intercept + X[:, self.cols[at]] @ self.w[at]


class Problem:
    """The regression of target ``t`` on its columns of some kinds, from moments, for any penalty."""

    def __init__(
        self,
        m: Moments,
        columns: Columns,
        target: str,
        t: int,
        settings: Settings,
        *,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self.cols, self._starts = pick(columns, target, m.usable, kinds)
        at = m.position[self.cols]
        self._gram, self._c = m.gram[np.ix_(at, at)], m.c[t, at]
        self._sizes = np.diff(columns.starts[target])  # the size of a group counts all its columns
        self._mean, self._sd, self._y_mean, self._settings = m.mean[self.cols], m.sd[self.cols], m.y_mean[t], settings

    @property
    def top(self) -> float:
        """The smallest penalty at which every coefficient is 0."""
        return float(np.abs(self._c).max(initial=0.0))

    def fit(self, penalty: Penalty, start: Fitted | None = None) -> Fitted:
        """Solve for one penalty, starting from another fit of the same problem if given."""
        s = self._settings
        lam = get_group_penalties(penalty.group, self._sizes, s.scale_reg)
        first = None if start is None else start.w * self._sd
        found = solve(self._gram, self._c, self._starts, l1=penalty.l1, lam_g=lam, tol=s.tol, start_m=first)
        w = found.w / self._sd
        return Fitted(float(self._y_mean - self._mean @ w), self.cols, w, found.kkt)


def is_standardized(settings: Settings) -> bool:
    """Return whether penalties act on standardised columns, because it is set or penalties are cross-validated."""
    return settings.standardize or settings.l1_reg is None


def get_path(m: Moments, columns: Columns, target: str, t: int, settings: Settings) -> list[Penalty]:
    """Return the candidate penalties, largest first, or only the penalty of the settings if there is one."""
    group = settings.group_reg or 0.0
    if settings.l1_reg is not None:
        return [Penalty(settings.l1_reg, group)]
    top = Problem(m, columns, target, t, settings).top
    return [Penalty(top * s, group) for s in _PATH]


def follow_path(problem: Problem, path: Sequence[Penalty]) -> Iterator[Fitted]:
    """Yield the fits along a path of penalties; each starts from the previous one."""
    fitted = None
    if len(path) > 1:  # the first penalty of a path makes every coefficient 0
        fitted = Fitted(0.0, problem.cols, np.zeros(len(problem.cols)), 0.0)
    for penalty in path:
        fitted = problem.fit(penalty, fitted)
        yield fitted


@dataclass(frozen=True)
class HeldOut:
    """Held-out errors of one target: (paths, folds) sums of squares and cells."""

    sse: np.ndarray
    n: np.ndarray

    def choose(self, folds: np.ndarray | None = None) -> int:
        """Return the largest penalty whose error is within one standard error of the least, over some folds."""
        sse, n = (self.sse, self.n) if folds is None else (self.sse[:, folds], self.n[folds])
        mean = sse.sum(1) / n.sum()
        best = int(np.argmin(mean))
        each = sse[best] / n
        error = float(each.std(ddof=1) / np.sqrt(len(n))) if len(n) > 1 else 0.0
        return int(np.flatnonzero(mean <= mean[best] + error)[0])

    @cached_property
    def errors(self) -> np.ndarray:
        """(folds,) sums of squares, where the penalty of each fold is chosen on the other folds."""
        folds = np.arange(len(self.n))
        if len(self.sse) == 1 or len(folds) < 2:
            return self.sse[0 if len(self.sse) == 1 else self.choose()]
        return np.array([self.sse[self.choose(folds[folds != k]), k] for k in folds])

    def r2(self, total: float) -> float:
        """Return R² from the total sum of squares."""
        return 1.0 - float(self.errors.sum()) / total if total > 0 else float("nan")

    def compare(self, other: HeldOut, total: float) -> float:
        """Return the standard error, over the folds, of the difference from the R² of another model."""
        folds = len(self.n)
        if total <= 0 or folds < 2:
            return float("nan")
        return float((other.errors - self.errors).std(ddof=1) * np.sqrt(folds)) / total


def hold_out(
    X: np.ndarray,
    Y: np.ndarray,
    folds: Sequence[Fold],
    columns: Columns,
    targets: Sequence[str],
    paths: Sequence[Sequence[Penalty]],
    settings: Settings,
    *,
    kinds: Sequence[str] = KINDS,
) -> list[HeldOut]:
    """Return the held-out errors of every target along its path of penalties."""
    sse = [np.zeros((len(p), len(folds))) for p in paths]
    n = np.array([len(f.test) for f in folds], np.float64)
    standardize = is_standardized(settings)
    for k, fold in enumerate(folds):
        m = measure(X[fold.train], Y[fold.train], min_nonzero=settings.min_nonzero, standardize=standardize)
        held = X[fold.test]
        for t, target in enumerate(targets):
            problem = Problem(m, columns, target, t, settings, kinds=kinds)
            fits = list(follow_path(problem, paths[t]))
            guess = held[:, problem.cols] @ np.array([f.w for f in fits]).T + [f.intercept for f in fits]
            guess = np.clip(guess, m.y_low[t], m.y_high[t])
            sse[t][:, k] = ((Y[fold.test, t, None] - guess) ** 2).sum(0)
    return [HeldOut(s, n) for s in sse]


@dataclass
class ClusterResult:
    """The results of one cluster for one target; R² is NaN if it was not measured.

    ``gain_error`` is the standard error of the gain over the held-out blocks.
    """

    fitted: Fitted
    penalty: Penalty
    r2_in: float
    r2_out: float = float("nan")
    r2_tf: float = float("nan")
    r2_own: float = float("nan")
    gain_error: float = float("nan")
    constant: int = 0
    copied: int = 0

    @property
    def gain(self) -> float:
        """Contribution of the neighbours to the held-out R²."""
        return self.r2_out - max(self.r2_tf, self.r2_own)


def fit_cluster(
    X: np.ndarray,
    X_own: np.ndarray | None,
    Y: np.ndarray,
    folds: Sequence[Fold],
    columns: Columns,
    targets: Sequence[str],
    settings: Settings,
) -> list[ClusterResult]:
    """Fit every target on the columns (b, p) and expression (b, t) of one cluster; ``X_own`` adds validation."""
    m = measure(X, Y, min_nonzero=settings.min_nonzero, standardize=is_standardized(settings))
    paths = [get_path(m, columns, g, t, settings) for t, g in enumerate(targets)]
    total = np.array([((Y[:, t] - m.y_mean[t]) ** 2).sum() for t in range(len(targets))])
    choosing = settings.l1_reg is None
    full = own = only = None
    if folds and (choosing or X_own is not None):
        full = hold_out(X, Y, folds, columns, targets, paths, settings)
    if folds and X_own is not None:
        own = hold_out(X_own, Y, folds, columns, targets, paths, settings)
        only = hold_out(X, Y, folds, columns, targets, paths, settings, kinds=(TF,))
    out = []
    for t, target in enumerate(targets):
        chosen = full[t].choose() if full is not None else len(paths[t]) - 1
        *_, f = follow_path(Problem(m, columns, target, t, settings), paths[t][: chosen + 1])
        residual = Y[:, t] - f.predict(X)
        r2_in = 1.0 - float(residual @ residual) / total[t] if total[t] > 0 else float("nan")
        result = ClusterResult(f, paths[t][chosen], r2_in)
        if X_own is not None and full is not None and own is not None and only is not None:
            result.r2_out, result.r2_own, result.r2_tf = (h[t].r2(total[t]) for h in (full, own, only))
            rival = own if result.r2_own > result.r2_tf else only
            result.gain_error = full[t].compare(rival[t], total[t])
        mine = columns.at[target]
        result.constant = int((~m.usable[mine]).sum())
        result.copied = _count_copies(m, mine[m.usable[mine]])
        out.append(result)
    return out


def _count_copies(m: Moments, cols: np.ndarray) -> int:
    """Return the number of columns that are copies of an earlier one."""
    if len(cols) < 2:
        return 0
    at = m.position[cols]
    keys = np.round(np.column_stack([m.gram[at, at], m.gram[at, at[0]], m.mean[cols] / m.sd[cols]]), 10)
    return len(cols) - len(np.unique(keys, axis=0))
