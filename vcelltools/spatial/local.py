"""Full mode: coefficients that vary from cell to cell around those of the cluster, kept only where they predict better.

The network is :mod:`vcelltools.model.local_betas`. It starts at the lasso of the cluster. Held-out blocks decide when
its training stops, and whether its coefficients replace those of the cluster. A lasso shrinks coefficients, so a
network that enlarges them everywhere alike also predicts better, although nothing varies over the tissue. Coefficients
by cell must therefore also beat those of a *blind* network, which sees neither the place nor the neighbours of a cell.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.spatial.betadata import Betas
from vcelltools.spatial.blocks import N_BLOCKS, make_joint_folds
from vcelltools.spatial.design import Features, join_columns, measure
from vcelltools.spatial.modulators import Modulators
from vcelltools.spatial.regress import ClusterResult, Problem, is_standardized
from vcelltools.spatial.settings import Settings
from vcelltools.spatial.tissue import Tissue

if TYPE_CHECKING:
    from vcelltools.model.local_betas import LocalFit

# columns of the summary in this mode
CELL_COLUMNS = ("r2_cluster", "r2_blind", "r2_cell", "cell_gain", "cell_error", "epochs", "per_cell")
_LEAST_COLUMNS = 16  # columns are filled up to this number times a power of four, so that few shapes are compiled


@dataclass(frozen=True)
class Verdict:
    """The comparison of coefficients by cell with those of the cluster, on the same held-out blocks.

    Attributes
    ----------
    r2_cluster, r2_blind, r2_cell
        Held-out R² of the cluster's coefficients, of those of the blind network (NaN if it was not trained, because
        coefficients by cell do not even beat the cluster's), and of coefficients by cell.
    cell_gain, cell_error
        ``r2_cell`` less the larger of the others, and the standard error of this difference over the blocks.
    epochs
        The epoch at which training stopped for the cluster.
    per_cell
        Whether coefficients by cell beat both others by more than the standard error of the difference.
    """

    r2_cluster: float
    r2_blind: float
    r2_cell: float
    cell_gain: float
    cell_error: float
    epochs: int
    per_cell: bool

    @property
    def note(self) -> str:
        """The reason for the choice."""
        if self.per_cell:
            return "one row per cell"
        if self.epochs == 0:
            return "one row for the cluster: no epoch of training predicts better"
        other = "those of a network that sees no place" if self.r2_blind > self.r2_cluster else "those of the cluster"
        return f"one row for the cluster: coefficients by cell do not beat {other} by more than the standard error"


def choose_epochs(sse: np.ndarray) -> np.ndarray:
    """Return (folds,) held-out errors; the epoch for each fold is the best one of the other folds.

    Parameters
    ----------
    sse
        (epochs + 1, folds) sums of squares.
    """
    folds = np.arange(sse.shape[1])
    return np.array([sse[int(np.argmin(sse[:, folds != k].sum(1))), k] for k in folds])


def judge(sse: np.ndarray, blind: np.ndarray | None, n: int) -> Verdict:
    """Compare the coefficients from held-out errors.

    Parameters
    ----------
    sse
        (epochs + 1, folds) sums of squares, in units of the variance of the expression; row 0 is the cluster's.
    blind
        The same for the blind network, if it was trained.
    n
        Number of held-out cells.
    """
    by_cell = choose_epochs(sse)
    others = [sse[0]] if blind is None else [sse[0], choose_epochs(blind)]
    gain = np.array([(o - by_cell).sum() / n for o in others])
    error = np.array([np.std(o - by_cell, ddof=1) * np.sqrt(len(by_cell)) / n for o in others])
    best = int(np.argmin(sse.sum(1)))
    nearest = int(np.argmin(gain))
    r2 = [1.0 - float(v.sum()) / n for v in (*others, by_cell)]
    return Verdict(
        r2_cluster=r2[0], r2_blind=float("nan") if blind is None else r2[1], r2_cell=r2[-1],
        cell_gain=float(gain[nearest]), cell_error=float(error[nearest]), epochs=best,
        per_cell=bool(best > 0 and (gain > error).all()),
    )  # fmt: skip


def pad_width(n_columns: int) -> int:
    """Return the number of columns of the network for some coefficients, of which only few shapes occur."""
    width = _LEAST_COLUMNS
    while width < n_columns:
        width *= 4
    return width


def estimate_bytes(n_cells: int, n_columns: int, n_clusters: int, settings: Settings) -> int:
    """Return the approximate memory in bytes to vary the coefficients of one target, if none of them is 0.

    Parameters
    ----------
    n_cells, n_columns, n_clusters
        Cells, columns of the target without the intercept, and clusters.
    """
    from vcelltools.model.local_betas import BATCH, Config
    from vcelltools.model.local_betas import estimate_bytes as count_network

    width = pad_width(1 + n_columns)
    clusters = 1 if settings.trunk == "own" else n_clusters
    config = Config(settings.encoder, settings.spatial_dim, clusters, width, min(BATCH, n_cells), settings.lr)
    # the columns, those in use, the padded ones with a product of each, single precision, and the coefficients by cell
    ours = n_cells * (8 * (5 * n_columns + 3 * width) + 4 * width)
    return ours + count_network(config, n_cells, N_BLOCKS + 1)


def count_neighbours(xy: np.ndarray, groups: np.ndarray, radius: float) -> np.ndarray:
    """Return (n, g) neighbours of each group within the radius, without the cell itself, over their mean total."""
    from scipy.spatial import cKDTree

    kinds = np.unique(groups)
    out = np.empty((len(xy), len(kinds)))
    for i, g in enumerate(kinds):
        mine = groups == g
        out[:, i] = cKDTree(xy[mine]).query_ball_point(xy, radius, return_length=True)
        out[mine, i] -= 1
    return out / max(out.sum(1).mean(), 1.0)


class LocalFitter:
    """Fits coefficients by cell for any target of a tissue; what does not depend on the target is computed once."""

    def __init__(self, tissue: Tissue, settings: Settings, features: Features) -> None:
        from vcelltools.model.mesh import choose_platform

        choose_platform(tpu=False)
        self._tissue, self._settings, self._features = tissue, settings, features
        tissue.place_cells()
        numbers = [c for c in sorted(tissue.labels) if (tissue.clusters == c).sum() >= settings.min_cells]
        self._numbers = numbers
        rows = np.flatnonzero(np.isin(tissue.clusters, numbers))
        name = np.unique(tissue.cells[rows].astype(str), return_inverse=True)[1]
        self._rows = rows[
            np.lexsort((name, *tissue.xy[rows].T))
        ]  # mini-batches do not depend on the order of the cells
        xy, groups = tissue.xy[self._rows], tissue.clusters[self._rows]
        self._at = np.searchsorted(numbers, groups)
        self._folds = make_joint_folds(xy, groups, settings.radius) if numbers else []
        low, side = tissue.xy.min(0), float(np.ptp(tissue.xy, axis=0).max())
        middle = (low + tissue.xy.max(0)) / 2
        self._place = (2 * (xy - middle) / side).astype(np.float32)
        self._counts = count_neighbours(tissue.xy, tissue.clusters, settings.radius)[self._rows].astype(np.float32)

    def refine(
        self, betas: Betas, modulators: Modulators, found: Mapping[int, ClusterResult]
    ) -> tuple[Betas, dict[int, Verdict]]:
        """Return the coefficients by cell, or ``betas`` itself if they are not better in any cluster; and why.

        Parameters
        ----------
        betas
            The coefficients by cluster; a row of zeros stays as it is.
        found
            The regressions of the clusters.
        """
        row_of = {int(c): i for i, c in enumerate(betas.keys)}
        active = [i for i, c in enumerate(self._numbers) if betas.values[row_of[c]].any()]
        if not active or len(self._folds) < 2:
            return betas, {}
        task = _Task(self, betas.values[[row_of[c] for c in self._numbers]], modulators, betas, found, active)
        verdicts: dict[int, Verdict] = {}
        factor = np.ones((self._tissue.n_cells, 1 + len(betas.names)))
        for part in task.parts:
            fit, blind = task.train(part), None
            n = [int((self._at == i).sum()) for i in part]
            curves = [fit.sse[:, :, task.head_of(i)] for i in part]
            if any(judge(c, None, m).per_cell for c, m in zip(curves, n, strict=True)):
                blind = task.train(part, blind=True)
            for i, curve, m in zip(part, curves, n, strict=True):
                v = judge(curve, None if blind is None else blind.sse[:, :, task.head_of(i)], m)
                verdicts[self._numbers[i]] = v
                if v.per_cell:
                    inside = np.flatnonzero(self._at[task.rows_of(part)] == i)
                    rows = self._rows[self._at == i]
                    factor[np.ix_(rows, task.places)] = fit.factor[inside, : len(task.places)]
        if not any(v.per_cell for v in verdicts.values()):
            return betas, verdicts
        of_cell = np.array([row_of[int(c)] for c in self._tissue.clusters], np.int64)
        names = np.array([str(c) for c in self._tissue.cells], dtype=object)
        base, values = betas.intercept[of_cell] * factor[:, 0], betas.values[of_cell] * factor[:, 1:]
        return Betas(betas.target, betas.names, names, base, values, True), verdicts


class _Task:
    """The arrays of one target: its columns, and the coefficients of every fold."""

    def __init__(
        self,
        fitter: LocalFitter,
        values_cm: np.ndarray,
        modulators: Modulators,
        betas: Betas,
        found: Mapping[int, ClusterResult],
        active: list[int],
    ) -> None:
        self._fitter, self._settings, self._active, self._target = fitter, fitter._settings, active, betas.target
        columns = join_columns({betas.target: modulators})
        features = fitter._features.narrow(columns)
        at, rows = columns.at[betas.target], fitter._rows
        X = features.build(rows)
        y = fitter._tissue.expression([betas.target])[rows, 0]
        n_folds, n_clusters = len(fitter._folds), len(fitter._numbers)
        beta = np.zeros((n_folds + 1, n_clusters, 1 + len(at)))
        self._low, self._high = np.zeros((n_folds, n_clusters)), np.zeros((n_folds, n_clusters))
        row_of = {int(c): i for i, c in enumerate(betas.keys)}
        self._sd = np.ones(n_clusters)
        for i in active:
            c = fitter._numbers[i]
            mine = fitter._at == i
            self._sd[i] = y[mine].std()
            beta[-1, i, 0], beta[-1, i, 1:] = betas.intercept[row_of[c]], values_cm[i]
            for k, fold in enumerate(fitter._folds):
                train = fold.train[mine[fold.train]]
                m = measure(X[train], y[train, None], min_nonzero=self._settings.min_nonzero,
                            standardize=is_standardized(self._settings))  # fmt: skip
                f = Problem(m, columns, betas.target, 0, self._settings).fit(found[c].penalty)
                beta[k, i, 0] = f.intercept
                beta[k, i, 1 + np.searchsorted(at, f.cols)] = f.w
                self._low[k, i], self._high[k, i] = m.y_low[0], m.y_high[0]
        self.used = np.flatnonzero(beta[:, :, 1:].any((0, 1)))
        terms = np.column_stack([np.ones(len(rows)), X[:, at[self.used]]])
        self.places = np.concatenate([[0], self.used + 1])  # of the intercept and of the columns in use
        self._y, self._X, self._beta = y, terms, beta[:, :, self.places]

    def rows_of(self, part: list[int]) -> np.ndarray:
        """Return the rows of the fitter that are trained together with the clusters ``part``."""
        if self._settings.trunk == "own":
            return np.flatnonzero(np.isin(self._fitter._at, part))
        return np.arange(len(self._fitter._at))

    def head_of(self, i: int) -> int:
        """Return the position of a cluster among the heads of its network."""
        return 0 if self._settings.trunk == "own" else i

    @property
    def parts(self) -> list[list[int]]:
        """The clusters that are trained together: all, or each alone if every cluster has its own trunk."""
        return [[i] for i in self._active] if self._settings.trunk == "own" else [self._active]

    def train(self, part: list[int], *, blind: bool = False) -> LocalFit:
        """Train the clusters of a part, on places and neighbours or without both."""
        from vcelltools.model.local_betas import BATCH, Cells, Config, Held, Runs, train

        s, fitter = self._settings, self._fitter
        rows = self.rows_of(part)
        heads = part if s.trunk == "own" else list(range(len(fitter._numbers)))
        cluster = np.searchsorted(heads, fitter._at[rows])
        sd = self._sd[heads]
        width = pad_width(self._X.shape[1])
        X = _pad(self._X[rows], width)
        beta = _pad(self._beta[:, heads] / sd[:, None], width)
        y = self._y[rows] / sd[cluster]
        start = np.stack([(X * b[cluster]).sum(1) for b in beta])
        active = np.isin(fitter._at[rows], part)
        weight = np.zeros(start.shape)
        weight[-1] = active
        place = np.full(len(fitter._at), -1)
        place[rows] = np.arange(len(rows))
        tests = []
        for k, fold in enumerate(fitter._folds):
            train_at, test_at = place[fold.train], place[fold.test]
            weight[k, train_at[train_at >= 0]] = 1.0
            tests.append(test_at[test_at >= 0])
        weight *= active
        held_rows = np.zeros((len(tests), max(map(len, tests))), np.int32)
        used = np.zeros(held_rows.shape)
        for k, test in enumerate(tests):
            held_rows[k, : len(test)], used[k, : len(test)] = test, active[test]
        config = Config(s.encoder, s.spatial_dim, len(heads), width, min(BATCH, len(rows)), s.lr)
        low, high = self._low[:, heads] / sd, self._high[:, heads] / sd
        seen = np.float32(not blind)
        return train(
            config,
            Cells(fitter._place[rows] * seen, fitter._counts[rows] * seen, cluster.astype(np.int32), _single(X)),
            Runs(_single(beta), _single(y - start), _single(weight)),
            Held(held_rows, _single(used), _single(np.take_along_axis(start[:-1], held_rows, 1)), _single(low),
                 _single(high)),
            epochs=s.epochs, seed=(s.seed, zlib.crc32(self._target.encode()), part[0] if s.trunk == "own" else 0),
            what=self._target,
        )  # fmt: skip


def _pad(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)
