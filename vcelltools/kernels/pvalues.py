"""From U to p: the normal approximation, the exact distribution of small samples, and Benjamini-Hochberg.

Two-sided Mann-Whitney (Mann & Whitney 1947; tie correction: Lehmann, Nonparametrics, 1975, ch. 1). Oracles:
``scipy.stats.mannwhitneyu`` and ``scipy.stats.false_discovery_control``.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def asymptotic_p(u_kg, tie_kg, n1_k, n2, continuity, p_kg):  # pragma: no cover  compiled
    """Write the two-sided asymptotic p of U; 1 where nothing varies."""
    root2 = math.sqrt(2.0)
    for k in range(u_kg.shape[0]):
        n1 = n1_k[k]
        n12, total = n1 * n2, n1 + n2
        for g in range(u_kg.shape[1]):
            p_kg[k, g] = 1.0
            variance = n12 / 12.0 * ((total + 1.0) - tie_kg[k, g] / (total * (total - 1.0)))
            if variance > 0.0:
                z = (max(u_kg[k, g], n12 - u_kg[k, g]) - n12 / 2.0 - continuity) / math.sqrt(variance)
                p_kg[k, g] = min(1.0, math.erfc(z / root2))


def set_exact_p(u_kg: np.ndarray, tie_kg: np.ndarray, p_kg: np.ndarray, size_k: np.ndarray, control: int) -> None:
    """Replace p by the exact one where there are no ties and a side has at most eight cells."""
    n2 = int(size_k[control])
    for k, n1 in enumerate(size_k.tolist()):
        if k == control or n1 == 0 or n2 == 0 or min(n1, n2) > 8:
            continue
        genes = np.flatnonzero(tie_kg[k] == 0)
        if len(genes):
            tail = get_exact_tail(n1, n2)
            u = np.maximum(u_kg[k, genes], n1 * n2 - u_kg[k, genes]).astype(np.int64)
            p_kg[k, genes] = np.minimum(1.0, 2.0 * tail[u])


_TAILS: dict[tuple[int, int], np.ndarray] = {}


def get_exact_tail(n1: int, n2: int) -> np.ndarray:
    """Return (n1·n2 + 1,) float64: P(U >= u) under the null without ties.

    The number of ways to reach each u is the Gaussian binomial coefficient of n1 + n2 over n1 (Mann & Whitney
    1947), built as Π (1 − q^(n + i)) / (1 − q^i) in whole numbers, so nothing cancels.
    """
    m, n = min(n1, n2), max(n1, n2)
    if (m, n) not in _TAILS:
        size = m * n + 1
        ways = np.zeros(size, dtype=object)
        ways[0] = 1
        for i in range(1, m + 1):
            lag = n + i
            if lag < size:
                ways[lag:] = ways[lag:] - ways[:-lag].copy()
            for offset in range(i):
                ways[offset::i] = np.cumsum(ways[offset::i])
        total = math.comb(m + n, m)
        reached = np.cumsum(ways[::-1])[::-1]
        _TAILS[m, n] = np.array([int(w) / total for w in reached], dtype=np.float64)
    return _TAILS[m, n]


def adjust_bh(p: np.ndarray) -> np.ndarray:
    """Return Benjamini-Hochberg adjusted p-values along the last axis (Benjamini & Hochberg 1995).

    Rows of a matrix are adjusted apart; pass ``p.ravel()`` to adjust all together. Equals
    ``scipy.stats.false_discovery_control``.
    """
    p = np.asarray(p, np.float64)
    if p.ndim > 1:
        return np.stack([adjust_bh(row) for row in p])
    m = len(p)
    order = np.argsort(p)
    scaled = p[order] * (m / np.arange(1, m + 1))
    out = np.empty(m)
    out[order] = np.clip(np.minimum.accumulate(scaled[::-1])[::-1], 0.0, 1.0)
    return out
