"""Draw negative binomial counts with a given effect, as an alternative to shifting control cells."""

from __future__ import annotations

import numpy as np

from vcelltools.prediction.shifted_cells import ControlStats

EMISSIONS = ("resampled", "counts", "pseudobulk")
_STEPS = 40  # number of bisection steps
_LARGEST = 1e4


def get_factors(stats: ControlStats, effect_m: np.ndarray) -> np.ndarray:
    """Return the factors (m,) on the expression of each gene that change its mean log1p by an effect.

    If few cells express a gene, more molecules mean more expressing cells; if all do, a higher level. For a share ``s``
    of expressing cells at level ``l``, a factor ``f`` gives ``s' = 1 - (1 - s)^f`` and a level
    ``log1p(expm1(l) f s / s')``. The factor is found by bisection. A gene that no control expresses has a factor of 1.
    """
    share = np.clip(stats.share_m, 0.0, 1.0 - 1e-12)
    wanted = np.maximum(stats.mean_m + effect_m, 0.0)

    def get_mean(factor: np.ndarray) -> np.ndarray:
        now = -np.expm1(np.log1p(-share) * factor)
        each = np.expm1(np.minimum(stats.level_m, 20.0)) * factor * share / np.maximum(now, 1e-300)
        return now * np.log1p(each)

    low, high = np.full(len(share), 1e-6), np.full(len(share), _LARGEST)
    for _ in range(_STEPS):
        middle = np.sqrt(low * high)
        above = get_mean(middle) > wanted
        high, low = np.where(above, middle, high), np.where(above, low, middle)
    factor = np.where(wanted <= 0, 0.0, np.sqrt(low * high))
    return np.where((share > 0) & (effect_m != 0), factor, 1.0)


def estimate_dispersion(total_m: np.ndarray, square_m: np.ndarray, library: np.ndarray) -> np.ndarray:
    """Return the dispersions (m,) ``a`` of counts with variance ``mu + a mu²``, where ``mu`` is a share of the library.

    They are estimated by the method of moments over the control cells, ``a = (Σ x² − Σ x − Σ mu²) / Σ mu²``, and at
    least 0. ``total_m`` and ``square_m`` are the sums of the counts and of their squares.
    """
    share = total_m / library.sum()
    expected = share**2 * float((library**2).sum())
    return np.maximum(square_m - total_m - expected, 0.0) / np.maximum(expected, 1e-12)


def draw_counts(
    share_m: np.ndarray, dispersion_m: np.ndarray, library_b: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return negative binomial counts (b, m) int32 with means ``library × share`` and the dispersions of the line."""
    mean = library_b[:, None] * share_m[None, :]
    shape = 1.0 / np.maximum(dispersion_m, 1e-6)
    spread = rng.gamma(np.broadcast_to(shape, mean.shape)) / shape
    return rng.poisson(mean * np.where(dispersion_m > 1e-6, spread, 1.0)).astype(np.int32)
