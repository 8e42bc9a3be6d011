"""The metrics on arrays of perturbations × genes, one function each, named after its column.

Definitions and edge cases are cell-eval's (0.8.2, MIT): effects are differences to the controls of the same
file; S is the set of genes with adjusted p < 0.05; tables are compared in float32. A value may be null (the
perturbation has no such value) or NaN (the value is undefined): the two aggregate differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vcelltools.differential.reduce import Reduced
from vcelltools.kernels.distance import effect_distances
from vcelltools.kernels.tieorder import INSERTION, quicksort_order
from vcelltools.scoring.cell_eval.de_table import DeTable
from vcelltools.scoring.cell_eval.rules import Rules
from vcelltools.scoring.tables import ScoreTable

NULL = None
ROUNDING = 1e-12
"""Relative error of sums over the cells of a group."""


@dataclass(kw_only=True)
class Pair:
    """The input of the metrics: the pseudobulks and effects of both sides, perturbations × genes.

    Attributes
    ----------
    names, genes
        Perturbations (sorted as text) and genes.
    pred_pg, real_pg, pred_control_g, real_control_g
        Mean log1p expression.
    pred_de, real_de
        The DE tables, or None if they were not computed.
    rules
        The rule set.
    target_p
        (p,) the column with the name of the perturbation, or -1.
    edistance
        Function that returns (pred, real) energy distances by perturbation; None if the cells are not available.
    threads
        Number of threads of the distance kernel.
    """

    names: list[str]
    genes: np.ndarray
    pred_pg: np.ndarray
    real_pg: np.ndarray
    pred_control_g: np.ndarray
    real_control_g: np.ndarray
    pred_de: DeTable | None
    real_de: DeTable | None
    rules: Rules
    edistance: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    threads: int = 1
    distances: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def pred_delta_pg(self) -> np.ndarray:
        """Predicted effects."""
        return self._delta(self.pred_pg, self.pred_control_g)

    @property
    def real_delta_pg(self) -> np.ndarray:
        """True effects."""
        return self._delta(self.real_pg, self.real_control_g)

    def _delta(self, mean_pg: np.ndarray, control_g: np.ndarray) -> np.ndarray:
        """Return the difference; except under the official rules, rounding errors of the sums are set to zero.

        Otherwise, cells that are copies of controls would have an effect that depends on the order of summation.
        """
        delta = mean_pg - control_g
        if not self.rules.peer_precision:
            delta[np.abs(delta) <= ROUNDING * (np.abs(mean_pg) + np.abs(control_g))] = 0.0
        return delta

    @property
    def target_p(self) -> np.ndarray:
        """(p,) int64 column of the gene named exactly as the perturbation, or -1."""
        column = {str(g): i for i, g in reversed(list(enumerate(self.genes)))}
        return np.array([column.get(n, -1) for n in self.names], np.int64)

    @property
    def tables(self) -> tuple[DeTable, DeTable]:
        """Both tables."""
        assert self.pred_de is not None
        assert self.real_de is not None
        return self.pred_de, self.real_de


def get_bulk(side: Reduced, rules: Rules) -> np.ndarray:
    """Return (k, g) pseudobulks, rounded to the precision of the data; under our rules, in float64."""
    mean = side.sums.mean_kg.astype(side.dtype)
    return mean if rules.peer_precision else mean.astype(np.float64)


def make_pair(
    pred: Reduced,
    real: Reduced,
    pred_de: DeTable | None,
    real_de: DeTable | None,
    rules: Rules,
    threads: int,
    edistance: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Pair:
    """Combine two sides for the metrics."""
    a, b = get_bulk(pred, rules), get_bulk(real, rules)
    return Pair(
        names=real.names,
        genes=real.genes,
        pred_pg=a[pred.perts],
        real_pg=b[real.perts],
        pred_control_g=a[pred.control],
        real_control_g=b[real.control],
        pred_de=pred_de,
        real_de=real_de,
        rules=rules,
        edistance=edistance,
        threads=threads,
    )


Values = list[float | None]


def compute_all(pair: Pair, names: list[str]) -> ScoreTable:
    """Compute the metrics in order."""
    columns: dict[str, list[float | None]] = {}
    for name in names:
        columns |= compute(name, pair)
    return ScoreTable(names=pair.names, columns=columns)


def compute(name: str, pair: Pair) -> dict[str, Values]:
    """Return the columns of a metric; none if the official implementation has none."""
    if name.startswith(("overlap_at_", "precision_at_")):
        kind, k = name.split("_at_")
        return {name: _overlap(pair, None if k == "N" else int(k), kind)}
    if name.startswith("discrimination_score_"):
        if pair.rules.peer_precision and len(pair.genes) == 1 and (pair.target_p == 0).any():
            return {}  # no gene is left
        return {name: _discrimination(pair, name.removeprefix("discrimination_score_"))}
    return _FUNCTIONS[name](pair)


# ---- agreement of pseudobulks ----


def _errors(pair: Pair, *, delta: bool, power: int) -> Values:
    a, b = (pair.pred_delta_pg, pair.real_delta_pg) if delta else (pair.pred_pg, pair.real_pg)
    out: Values = []
    for x, y in zip(a, b, strict=True):
        d = np.abs(x - y) if power == 1 else (y - x) ** 2
        out.append(float(d.mean()))
    return out


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's r in the precision of the inputs; NaN if an input is constant."""
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    xm, ym = x - x.mean(), y - y.mean()
    xmax, ymax = np.abs(xm).max(), np.abs(ym).max()
    with np.errstate(divide="ignore", invalid="ignore"):
        xn, yn = xmax * np.linalg.norm(xm / xmax), ymax * np.linalg.norm(ym / ymax)
        return float(np.clip(np.sum(xm / xn * (ym / yn)), -1.0, 1.0))


def _pearson_delta(pair: Pair) -> dict[str, Values]:
    if pair.rules.peer_precision and len(pair.genes) == 1:
        return {}
    return {"pearson_delta": [pearson(x, y) for x, y in zip(pair.pred_delta_pg, pair.real_delta_pg, strict=True)]}


# ---- discrimination ----


def _discrimination(pair: Pair, metric: str) -> Values:
    distance = get_distances(pair, metric)
    n = len(pair.names)
    ranks: list[float] = []
    for p in range(n):
        row = distance[p]
        if pair.rules.mid_ranks:
            nearer = np.count_nonzero(row < row[p])
            tied = np.count_nonzero(row == row[p])
            ranks.append(nearer + (tied - 1) / 2)
        else:
            ranks.append(int(np.flatnonzero(np.argsort(row) == p)[0]))
    return [1 - r / n for r in ranks]


def get_distances(pair: Pair, metric: str) -> np.ndarray:
    """Return (p, q): distance of predicted effect p to true effect q, without the target gene of p.

    The distance is ``l1``, ``l2``, ``cosine``, or ``matched``: l1 after scaling the predicted effect to the length of
    the true one.
    """
    if metric in pair.distances:
        return pair.distances[metric]
    pred, real = pair.pred_delta_pg, pair.real_delta_pg
    if metric == "cosine":
        out = _cosine_distances(pred, real, pair.target_p)
    else:
        if metric == "matched":
            pred = pred * _ratio(np.linalg.norm(real, axis=1), np.linalg.norm(pred, axis=1))[:, None]
        l1, squared = _run_distances(pred, real, pair.target_p, pair.threads)
        # the official implementation keeps Euclidean distances in the precision of the data, and l1 in float64
        kind = np.result_type(pred, real)
        if metric == "matched":
            out = l1
        else:
            pair.distances["l1"], pair.distances["l2"] = l1, np.sqrt(squared.astype(kind))
            return pair.distances[metric]
    pair.distances[metric] = out
    return out


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _run_distances(pred, real, skip_p: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    from concurrent.futures import ThreadPoolExecutor

    kind = np.result_type(pred, real)
    a, b = np.ascontiguousarray(pred, kind), np.ascontiguousarray(real, kind)
    l1, squared = np.empty((len(a), len(b))), np.empty((len(a), len(b)))
    step = max(1, -(-len(a) // (4 * threads)))
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(effect_distances, a, b, skip_p, i, min(i + step, len(a)), l1, squared)
            for i in range(0, len(a), step)
        ]
        for job in jobs:
            job.result()
    return l1, squared


def _cosine_distances(pred: np.ndarray, real: np.ndarray, skip_p: np.ndarray) -> np.ndarray:
    """Cosine distances clipped to [0, 2]; a vector shorter than ten machine epsilons has no direction."""
    kind = np.result_type(pred, real)
    pred, real = pred.astype(kind), real.astype(kind)
    tiny = 10 * np.finfo(kind).eps

    def unit(m: np.ndarray) -> np.ndarray:
        length = np.sqrt(np.einsum("ij,ij->i", m, m))
        length[length < tiny] = 1
        return m / length[:, None]

    out = np.empty((len(pred), len(real)), kind)
    whole = unit(real) if (skip_p < 0).any() else None
    for p, s in enumerate(skip_p):
        if s >= 0:
            mask = np.flatnonzero(np.arange(real.shape[1]) != s)
            row = unit(real[:, mask]) @ unit(pred[p : p + 1, mask]).T
        else:
            assert whole is not None
            row = whole @ unit(pred[p : p + 1]).T
        out[p] = np.clip(1 - row[:, 0], 0, 2)
    return out


# ---- differential expression ----


def _leading(table: DeTable, i: int, n: int, rules: Rules) -> np.ndarray:
    """Return the first n significant genes of row i by |log2FC| descending in float32, ties in gene order.

    The official sort only keeps ties in order in short lists; if the cutoff falls among ties, its order is reproduced.
    """
    genes = np.flatnonzero(table.significant_pg[i])
    size = np.abs(table.log2fc_pg[i, genes].astype(np.float32))
    order = np.argsort(-size, kind="stable")
    if rules.quicksort_ties and len(order) > INSERTION and n < len(order) and size[order[n - 1]] == size[order[n]]:
        quicksort_order(-size, order)
    return genes[order[:n]]


def _overlap(pair: Pair, k: int | None, kind: str) -> Values:
    pred, real = pair.tables
    out: Values = []
    for i in range(len(pair.names)):
        n_real, n_pred = (int(np.count_nonzero(t.significant_pg[i])) for t in (real, pred))
        if pair.rules.null_empty and n_real == 0:
            out.append(NULL)
            continue
        limit = n_real if kind == "overlap" else n_pred
        n = min(k, limit) if k else limit
        a, b = (_leading(t, i, n, pair.rules) if n else () for t in (real, pred))
        out.append(len(np.intersect1d(a, b)) / n if n else 0.0)
    return out


def rank_average(x: np.ndarray) -> np.ndarray:
    """Return mid-ranks from 1."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation; NaN for fewer than two values or a constant input."""
    if len(x) < 2:
        return float("nan")
    a, b = rank_average(x), rank_average(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _spearman_sig(pair: Pair) -> dict[str, Values]:
    pred, real = pair.tables
    n_real, n_pred = real.significant_pg.sum(axis=1), pred.significant_pg.sum(axis=1)
    some = n_real > 0
    value = spearman(n_real[some], n_pred[some]) if some.any() else 1.0
    return {"de_spearman_sig": [value] * len(pair.names)}


def _kept(table: DeTable, i: int) -> np.ndarray:
    return table.keep_pg[i] if table.keep_pg is not None else np.ones(table.p_pg.shape[1], bool)


def _direction_match(pair: Pair) -> dict[str, Values]:
    pred, real = pair.tables
    out: Values = []
    for i in range(len(pair.names)):
        genes = np.flatnonzero(real.significant_pg[i] & _kept(pred, i))
        if len(genes) == 0:
            out.append(NULL)
            continue
        a, b = (np.sign(t.log2fc_pg[i, genes].astype(np.float32)) for t in (real, pred))
        out.append(float((a == b).mean()))
    return _or_nothing("de_direction_match", out)


def _spearman_lfc(pair: Pair) -> dict[str, Values]:
    pred, real = pair.tables
    out: Values = []
    for i in range(len(pair.names)):
        kept = _kept(pred, i)
        genes = np.flatnonzero(real.significant_pg[i] & kept if pair.rules.fold_spearman else real.significant_pg[i])
        if len(genes) == 0:
            out.append(NULL)
            continue
        if pair.rules.fold_spearman:
            assert real.ratio_pg is not None
            assert pred.ratio_pg is not None
            a, b = (t.ratio_pg[i, genes].astype(np.float32) for t in (real, pred))  # type: ignore[index]
        else:
            a = real.log2fc_pg[i, genes].astype(np.float32)
            b = np.where(kept[genes], pred.log2fc_pg[i, genes], 0.0).astype(np.float32)
        out.append(spearman(a, b))
    return _or_nothing("de_spearman_lfc_sig", out)


def _recall(pair: Pair) -> dict[str, Values]:
    pred, real = pair.tables
    both = (pred.significant_pg & real.significant_pg).sum(axis=1)
    n = real.significant_pg.sum(axis=1)
    out: Values = [float(b / m) if m else NULL for b, m in zip(both, n, strict=True)]
    return _or_nothing("de_sig_genes_recall", out)


def _or_nothing(name: str, values: Values) -> dict[str, Values]:
    """Return the column, or none if no perturbation has a value, as in the official output."""
    return {name: values} if any(v is not NULL for v in values) else {}


def _nsig(pair: Pair) -> dict[str, Values]:
    pred, real = pair.tables
    return {
        "de_nsig_counts_real": [float(n) for n in real.significant_pg.sum(axis=1)],
        "de_nsig_counts_pred": [float(n) for n in pred.significant_pg.sum(axis=1)],
    }


class Hits(NamedTuple):
    """The numbers of positives among the highest scores, at the end of every group of equal scores."""

    hits: np.ndarray
    """Number of positives."""
    seen: np.ndarray
    """Number of all."""
    positive: int
    """Number of positives in total."""
    total: int
    """Number of scores."""


def count_hits(label: np.ndarray, score: np.ndarray) -> Hits | None:
    """Count the positives among the highest scores; None if there is only one class."""
    positive = int(label.sum())
    if not 0 < positive < len(label):
        return None
    order = np.argsort(-score)  # the order of equal scores does not count
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    return Hits(np.cumsum(label[order])[ends].astype(np.float64), ends + 1.0, positive, len(label))


def get_area(found: Hits | None, method: str) -> float:
    """Return the average precision (``"pr"``) or the area under the ROC curve; NaN if there is only one class."""
    if found is None:
        return float("nan")
    hits, seen, positive, total = found
    if method == "pr":
        return float(np.sum(np.diff(hits, prepend=0.0) / positive * (hits / seen)))
    tpr = np.concatenate([[0.0], hits / positive])
    fpr = np.concatenate([[0.0], (seen - hits) / (total - positive)])
    return float(np.trapezoid(tpr, fpr))


def _auc(pair: Pair, method: str) -> Values:
    pred, real = pair.tables
    out: Values = []
    for i in range(len(pair.names)):
        kept = _kept(real, i)
        label = real.significant_pg[i, kept]
        q = pred.fdr_pg[i, kept].astype(np.float32)
        q[np.isnan(q)] = 1
        floor = np.float32(1e-10)
        score = -np.log10(np.clip(q, floor, np.float32(1)) if pair.rules.clip_scores else np.where(q == 0, floor, q))
        out.append(get_area(count_hits(label, score), method))
    return out


# ---- whole-data metrics ----


def _pearson_edistance(pair: Pair) -> dict[str, Values]:
    if len(pair.names) < 2 or pair.edistance is None:
        return {}
    pred, real = pair.edistance()
    for e, mean_pg in ((pred, pair.pred_pg), (real, pair.real_pg)):  # equal except for rounding
        if np.ptp(e) <= (4e-7 if mean_pg.dtype == np.float32 else 1e-10) * np.abs(e).max():
            return {"pearson_edistance": [float("nan")] * len(pair.names)}
    return {"pearson_edistance": [pearson(real, pred)] * len(pair.names)}


def _clustering(pair: Pair) -> dict[str, Values]:
    from vcelltools.scoring.cell_eval.clustering import clustering_agreement

    value = clustering_agreement(pair.pred_pg.astype(np.float64), pair.real_pg.astype(np.float64))
    return {} if value is None else {"clustering_agreement": [value] * len(pair.names)}


# ---- ours ----


def _weights(pair: Pair) -> np.ndarray:
    """Return (p, g) weights that sum to one: the square of the min-max scaled |z| of each gene in the truth.

    After Mejia et al. 2025 (weighted errors for perturbation prediction), with the rank test's z in place of t.
    """
    from scipy.special import ndtri

    _, real = pair.tables
    z = -ndtri(np.clip(real.p_pg, 1e-300, 1) / 2)
    low, high = z.min(axis=1, keepdims=True), z.max(axis=1, keepdims=True)
    w = np.where(high > low, (z - low) / np.where(high > low, high - low, 1), 1.0) ** 2
    return w / w.sum(axis=1, keepdims=True)


def _weighted(pair: Pair, power: int) -> Values:
    w = _weights(pair)
    d = np.abs(pair.pred_delta_pg - pair.real_delta_pg)
    return [float(v) for v in (w * d**power).sum(axis=1)]


def _weighted_r2(pair: Pair) -> dict[str, Values]:
    w = _weights(pair)
    x, y = pair.pred_delta_pg, pair.real_delta_pg
    mean = (w * y).sum(axis=1, keepdims=True)
    total, rest = (w * (y - mean) ** 2).sum(axis=1), (w * (y - x) ** 2).sum(axis=1)
    return {
        "weighted_r2_delta": [float(1 - r / t) if t > 0 else float("nan") for r, t in zip(rest, total, strict=True)]
    }


def _cosine_delta(pair: Pair) -> dict[str, Values]:
    x, y = pair.pred_delta_pg, pair.real_delta_pg
    scale = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dot = (x * y).sum(axis=1)
    return {"cosine_delta": [float(d / s) if s > 0 else float("nan") for d, s in zip(dot, scale, strict=True)]}


def _norm_ratio(pair: Pair) -> dict[str, Values]:
    x, y = np.linalg.norm(pair.pred_delta_pg, axis=1), np.linalg.norm(pair.real_delta_pg, axis=1)
    return {"effect_norm_ratio": [float(a / b) if b > 0 else float("nan") for a, b in zip(x, y, strict=True)]}


_FUNCTIONS: dict[str, Callable[[Pair], dict[str, Values]]] = {
    "mae": lambda pair: {"mae": _errors(pair, delta=False, power=1)},
    "mse": lambda pair: {"mse": _errors(pair, delta=False, power=2)},
    "mae_delta": lambda pair: {"mae_delta": _errors(pair, delta=True, power=1)},
    "mse_delta": lambda pair: {"mse_delta": _errors(pair, delta=True, power=2)},
    "pearson_delta": _pearson_delta,
    "de_spearman_sig": _spearman_sig,
    "de_direction_match": _direction_match,
    "de_spearman_lfc_sig": _spearman_lfc,
    "de_sig_genes_recall": _recall,
    "de_nsig_counts": _nsig,
    "pr_auc": lambda pair: {"pr_auc": _auc(pair, "pr")},
    "roc_auc": lambda pair: {"roc_auc": _auc(pair, "roc")},
    "pearson_edistance": _pearson_edistance,
    "clustering_agreement": _clustering,
    "wmse_delta": lambda pair: {"wmse_delta": _weighted(pair, 2)},
    "wmae_delta": lambda pair: {"wmae_delta": _weighted(pair, 1)},
    "weighted_r2_delta": _weighted_r2,
    "cosine_delta": _cosine_delta,
    "effect_norm_ratio": _norm_ratio,
}
