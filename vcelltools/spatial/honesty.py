"""Measure what the data support: rearranged senders (null), and half-samples of blocks (stability)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vcelltools.spatial.blocks import cut_blocks
from vcelltools.spatial.design import Columns, measure
from vcelltools.spatial.regress import ClusterResult, Problem, is_standardized
from vcelltools.spatial.settings import Settings

_STABILITY_BLOCKS = 24
STABLE = 0.9  # a modulator is stable if at least this share of half-samples selects it
_SQUARE = 1.25  # sides whose ratio is smaller may be swapped


def rearrange(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the coordinates mirrored, rotated and shifted on the torus of their bounding box.

    This keeps the distances between senders (except across the seam), and so the autocorrelation of their signals. It
    changes their positions relative to the receivers.
    """
    low, side = xy.min(0), np.ptp(xy, axis=0)
    side = np.where(side > 0, side, 1.0)
    u = (xy - low) / side
    for axis in range(u.shape[1]):
        if rng.random() < 0.5:
            u[:, axis] = 1.0 - u[:, axis]
    if max(side[:2]) <= _SQUARE * min(side[:2]) and rng.random() < 0.5:
        u[:, [0, 1]] = u[:, [1, 0]]
    u = (u + rng.random(u.shape[1])) % 1.0
    return low + u * side


def get_p_values(gain: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return (1 + number of null gains at least as large) / (1 + number of null gains), NaN if the gain is NaN.

    Parameters
    ----------
    gain, null
        (k,) and (b, k).
    """
    with np.errstate(invalid="ignore"):
        p = (1.0 + (null >= gain).sum(0)) / (1.0 + len(null))
    return np.where(np.isfinite(gain), p, np.nan)


def adjust(p: np.ndarray) -> np.ndarray:
    """Return Benjamini-Hochberg adjusted p-values over those that are not NaN."""
    out = np.full(len(p), np.nan)
    at = np.flatnonzero(np.isfinite(p))
    if len(at):
        order = at[np.argsort(p[at], kind="stable")]
        q = p[order] * len(order) / np.arange(1, len(order) + 1)
        out[order] = np.minimum(np.minimum.accumulate(q[::-1])[::-1], 1.0)
    return out


@dataclass(frozen=True)
class Stability:
    """The frequency with which halves of the tissue select each column of a target.

    Attributes
    ----------
    frequency, agreement
        (m,) share of half-samples with a coefficient, and the share of these with the more frequent sign.
    expected_false
        Bound on the expected number of columns that are stable by chance (Meinshausen & Bühlmann 2010,
        doi:10.1111/j.1467-9868.2010.00740.x).
    """

    frequency: np.ndarray
    agreement: np.ndarray
    expected_false: float


def measure_stability(
    X: np.ndarray,
    Y: np.ndarray,
    xy: np.ndarray,
    columns: Columns,
    targets: Sequence[str],
    results: Sequence[ClusterResult],
    settings: Settings,
) -> list[Stability]:
    """Refit every target on ``settings.stability`` halves of the cluster's blocks, with its penalty."""
    blocks = cut_blocks(xy, min(_STABILITY_BLOCKS, max(2, len(xy) // 4)))
    n_blocks = int(blocks.max()) + 1
    positive = [np.zeros(len(columns.at[g])) for g in targets]
    negative = [np.zeros(len(columns.at[g])) for g in targets]
    place = [{int(c): i for i, c in enumerate(columns.at[g])} for g in targets]
    selected = np.zeros(len(targets))
    for b in range(settings.stability):
        rng = np.random.default_rng([settings.seed, 1, b])
        rows = np.flatnonzero(np.isin(blocks, rng.permutation(n_blocks)[: n_blocks // 2]))
        m = measure(X[rows], Y[rows], min_nonzero=settings.min_nonzero, standardize=is_standardized(settings))
        for t, g in enumerate(targets):
            f = Problem(m, columns, g, t, settings).fit(results[t].penalty)
            for i in np.flatnonzero(f.w):
                (positive if f.w[i] > 0 else negative)[t][place[t][int(f.cols[i])]] += 1
                selected[t] += 1
    out = []
    for t in range(len(targets)):
        times = positive[t] + negative[t]
        agreement = np.divide(
            np.maximum(positive[t], negative[t]), times, out=np.full(len(times), np.nan), where=times > 0
        )
        mean = selected[t] / settings.stability
        bound = mean**2 / ((2 * STABLE - 1) * max(len(times), 1))
        out.append(Stability(times / settings.stability, agreement, float(bound)))
    return out
