"""Measure whether predicted and true centroids fall into the same clusters.

Centroids are clustered with Leiden (Traag et al. 2019; igraph) on UMAP's fuzzy neighbour graph (McInnes et al.
2018), the true ones at resolution 1, the predicted ones at several; the best adjusted mutual information
(Vinh et al. 2010) is used. Oracle: scanpy's ``neighbors`` and ``leiden`` with scikit-learn's score.
"""

from __future__ import annotations

import numpy as np

from vcelltools.errors import EnvironmentFault, spell

REAL_RESOLUTION = 1.0
PRED_RESOLUTIONS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
NEIGHBORS = 15


def clustering_agreement(pred_pg: np.ndarray, real_pg: np.ndarray) -> float | None:
    """Return the best agreement, at least 0; None for fewer than three perturbations.

    Parameters
    ----------
    pred_pg, real_pg
        Centroids without the control, in float64.

    Raises
    ------
    EnvironmentFault
        If igraph is not installed.
    """
    if len(real_pg) < 3:
        return None
    k = min(NEIGHBORS, len(real_pg) - 1)
    real = leiden(fuzzy_graph(real_pg, k), REAL_RESOLUTION)
    graph = fuzzy_graph(pred_pg, k)
    return max(0.0, *(adjusted_mutual_information(real, leiden(graph, r)) for r in PRED_RESOLUTIONS))


def fuzzy_graph(x_pg: np.ndarray, k: int) -> np.ndarray:
    """Return UMAP's (p, p) float32 weights between each point and its k nearest points, including itself."""
    n = len(x_pg)
    squared = np.einsum("ij,ij->i", x_pg, x_pg)
    d = np.sqrt(np.maximum(squared[:, None] + squared - 2 * (x_pg @ x_pg.T), 0))
    np.fill_diagonal(d, -1)  # the point itself first, regardless of ties
    nearest = np.argsort(d, axis=1, kind="stable")[:, :k]
    np.fill_diagonal(d, 0)
    dist = np.take_along_axis(d, nearest, axis=1).astype(np.float32)
    weight = np.zeros((n, n), np.float32)
    for i in range(n):
        rho, sigma = _smooth(dist[i], float(dist.mean()))
        for j, far in zip(nearest[i], dist[i], strict=True):
            if j != i:
                near = far - rho <= 0 or sigma == 0
                weight[i, j] = 1.0 if near else np.exp(-((far - rho) / sigma))
    return weight + weight.T - weight * weight.T


def _smooth(dist: np.ndarray, overall: float) -> tuple[np.float32, np.float32]:
    """Return the distance to the nearest other point, and the scale at which the weights sum to log2(k)."""
    target = np.log2(len(dist))
    positive = dist[dist > 0]
    rho = np.float32(positive[0] if len(positive) else 0)
    gap = np.maximum(dist[1:] - rho, 0).astype(np.float64)
    low, high, middle = np.float32(0), np.finfo(np.float32).max, np.float32(1)
    for _ in range(64):
        total = float(np.exp(-gap / float(middle)).sum())
        if abs(total - target) < 1e-5:
            break
        if total > target:
            high = middle
            middle = np.float32((low + high) / np.float32(2))
        else:
            low = middle
            middle = np.float32(middle * 2) if high >= np.finfo(np.float32).max else np.float32((low + high) / 2)
    floor = 1e-3 * (float(dist.mean()) if rho > 0 else overall)
    return rho, np.float32(max(float(middle), floor))


class _Random:
    """Random numbers for igraph from numpy's legacy generator, as scanpy passes them."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.RandomState(seed)

    def getrandbits(self, k: int) -> int:
        """Return k random bits."""
        return int(self._rng.tomaxint()) & ((1 << k) - 1)

    def randint(self, a: int, b: int) -> int:
        """Return an integer of a .. b."""
        return int(self._rng.randint(a, b + 1))

    def random(self) -> float:
        """Return a float in [0, 1)."""
        return float(self._rng.random_sample())

    def gauss(self, mean: float, sd: float) -> float:
        """Return a normal deviate."""
        return float(self._rng.normal(mean, sd))


def leiden(weight: np.ndarray, resolution: float) -> np.ndarray:
    """Return the cluster of each vertex (modularity, two iterations, seed 0, both directions of each edge)."""
    try:
        import igraph
    except ImportError as e:
        raise EnvironmentFault(
            "clustering_agreement needs igraph",
            hint=f"pip install igraph, or use {spell('skip')} clustering_agreement",
        ) from e
    import random

    sources, targets = weight.nonzero()
    graph = igraph.Graph(n=len(weight), edges=list(zip(sources.tolist(), targets.tolist(), strict=True)))
    graph.es["weight"] = weight[sources, targets].astype(np.float64).tolist()
    igraph.set_random_number_generator(_Random(0))
    try:
        part = graph.community_leiden(
            objective_function="modularity", weights="weight", resolution=resolution, n_iterations=2
        )
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(part.membership)


def adjusted_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return the adjusted mutual information, normalised by the mean entropy (Vinh et al. 2010)."""
    from scipy.special import gammaln, xlogy

    n = len(a)
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    if a.max() == 0 or b.max() == 0:
        return 1.0 if a.max() == b.max() else 0.0
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    rows, cols = table.sum(axis=1), table.sum(axis=0)

    def entropy(counts: np.ndarray) -> float:
        return float(-xlogy(counts / n, counts / n).sum())

    some = table > 0
    mutual = float((table[some] / n * (np.log(table[some] * n) - np.log(np.outer(rows, cols)[some]))).sum())
    mutual = max(mutual, 0.0)
    expected = 0.0
    for r in rows:
        for c in cols:
            m = np.arange(max(1, r + c - n), min(r, c) + 1)
            log_p = (
                gammaln(r + 1) + gammaln(c + 1) + gammaln(n - r + 1) + gammaln(n - c + 1) - gammaln(n + 1)
                - gammaln(m + 1) - gammaln(r - m + 1) - gammaln(c - m + 1) - gammaln(n - r - c + m + 1)
            )  # fmt: skip
            expected += float((m / n * np.log(n * m / (r * c)) * np.exp(log_p)).sum())
    eps = float(np.finfo(np.float64).eps)

    def away_from_zero(v: float) -> float:
        return min(v, -eps) if v < 0 else max(v, eps)

    return away_from_zero(mutual - expected) / away_from_zero((entropy(rows) + entropy(cols)) / 2 - expected)
