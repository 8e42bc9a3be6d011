"""Thresholds of guides: fit a mixture of background and signal to the number of cells with each count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.runtime.threads import get_threads, share_work
from vcelltools.selection.histograms import Histograms

MIN_FITTED = 20
"""Minimum number of cells with counts for a guide's own fit; otherwise the fit of all guides together is used."""
_GUIDES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Fits:
    """The threshold of every guide, and the fit behind it.

    Attributes
    ----------
    threshold_g
        (g,) int64: the smallest count that assigns the guide.
    own_g
        (g,) bool: whether the guide has its own fit, and not the threshold of all guides together.
    params_gk
        (g, 5) float64: share of the signal, background and its size, signal and its spread
        (:func:`vcelltools.kernels.mixture.fit_mixtures`); NaN without a fit.
    histograms
        Numbers of cells with each count.
    """

    threshold_g: np.ndarray
    own_g: np.ndarray
    params_gk: np.ndarray
    histograms: Histograms


def fit(histograms: Histograms, method: str, threshold: int | None, *, threads: int | None = None) -> Fits:
    """Return the threshold of every guide, from the numbers of cells with each count.

    Raises
    ------
    DataError
        If even all guides together have no signal above the background.
    """
    from vcelltools.kernels.mixture import N_PARAMS, fit_mixtures

    g = histograms.n_genes
    params, own = np.full((g, N_PARAMS), np.nan), np.ones(g, bool)
    if threshold is not None:
        return Fits(threshold_g=np.full(g, threshold), own_g=own, params_gk=params, histograms=histograms)
    starts, values, weights = _flatten(histograms)
    found, gaussian = np.zeros(g, np.int64), method == "mixture"

    def work(first: int) -> None:
        part = slice(first, min(first + _GUIDES_AT_ONCE, g))
        fit_mixtures(starts[first : part.stop + 1], values, weights, gaussian, params[part], found[part])

    share_work(range(0, g, _GUIDES_AT_ONCE), [work] * get_threads(threads))
    n_g = np.add.reduceat(np.append(weights, 0.0), starts[:-1]) * (np.diff(starts) > 0)
    own = (found > 0) & (n_g >= MIN_FITTED)
    if not own.all():
        level, at = np.unique(values, return_inverse=True)
        total, pooled = np.bincount(at, weights=weights), np.zeros(1, np.int64)
        ends = np.array([0, len(level)], np.int64)
        fit_mixtures(ends, level, total, gaussian, np.empty((1, N_PARAMS)), pooled)
        if pooled[0] == 0 and not own.any():
            raise DataError(
                "the counts of the guides show no signal above a background",
                hint=f"use a fixed count with {spell('method', 'threshold')}",
            )
        usual = pooled[0] if pooled[0] else int(np.median(found[own]))
        found[~own] = usual
        params[~own] = np.nan
    return Fits(threshold_g=found, own_g=own, params_gk=params, histograms=histograms)


def _flatten(h: Histograms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (starts of the guides, distinct counts of at least 1, numbers of cells with each), in order."""
    widths = np.diff(h.offsets)
    gene = np.concatenate([np.repeat(np.arange(h.n_genes), widths), h.over_gene])
    value = np.concatenate([h._bin_values(), h.over_value])
    count = np.concatenate([h.counts[0], h.over_count])
    keep = (count > 0) & (value > 0)
    gene, value, count = gene[keep], value[keep], count[keep]
    order = np.lexsort((value, gene))
    starts = np.concatenate([[0], np.cumsum(np.bincount(gene, minlength=h.n_genes))])
    return starts.astype(np.int64), value[order].astype(np.float64), count[order].astype(np.float64)
