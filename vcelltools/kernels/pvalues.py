"""Compute p-values from U: normal approximation, exact distribution for small samples, Benjamini-Hochberg.

Two-sided Mann-Whitney (Mann & Whitney 1947; tie correction: Lehmann, Nonparametrics, 1975, ch. 1). Oracles:
``scipy.stats.mannwhitneyu`` and ``scipy.stats.false_discovery_control``.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel(inline=True)
def get_two_sided_p(u, tie, n1, n2, continuity):
    """Return the two-sided asymptotic p of U, given the sum of t³ − t over ties; 1 if nothing varies."""
    n12, total = n1 * n2, n1 + n2
    p = 1.0
    variance = n12 / 12.0 * ((total + 1.0) - tie / (total * (total - 1.0)))
    if variance > 0.0:
        z = (max(u, n12 - u) - n12 / 2.0 - continuity) / math.sqrt(variance)
        p = min(1.0, math.erfc(z / math.sqrt(2.0)))
    return p


@kernel()
def asymptotic_p(u_kg, tie_kg, n1_k, n2, continuity, p_kg):
    """Write the two-sided asymptotic p of U; 1 if nothing varies."""
    for k in range(u_kg.shape[0]):
        for g in range(u_kg.shape[1]):
            p_kg[k, g] = get_two_sided_p(u_kg[k, g], tie_kg[k, g], n1_k[k], n2, continuity)


def set_exact_p(u_kg: np.ndarray, tie_kg: np.ndarray, p_kg: np.ndarray, size_k: np.ndarray, control: int) -> None:
    """Replace p with the exact one if there are no ties and a sample has at most eight cells."""
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
    """Return (n1·n2 + 1,) float64: P(U >= u) under the null hypothesis without ties.

    The number of ways to reach each u is the Gaussian binomial coefficient of n1 + n2 over n1 (Mann & Whitney
    1947), computed as Π (1 − q^(n + i)) / (1 − q^i) in integers, so there is no cancellation.
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

    Rows of a matrix are adjusted separately; pass ``p.ravel()`` to adjust all together. The result equals
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
