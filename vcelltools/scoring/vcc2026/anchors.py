"""Compute the two ends of the 2026 scale: the mean response (0) and a replicate of the experiment (1)."""

from __future__ import annotations

import numpy as np

from vcelltools.errors import DataError
from vcelltools.scoring.vcc2026.counts import GeneMajor, make_tables
from vcelltools.scoring.vcc2026.metrics import (
    EXPRESSION,
    LOWER_IS_BETTER,
    METRICS,
    NMAE,
    Values,
    align,
    compare,
    finite_mean,
    get_nmae,
)
from vcelltools.scoring.vcc2026.profiles import TARGET_SUM, Profiles, make_profiles

N_SPLITS = 5
NMAE_FLOOR = -6.0


def get_seeds() -> list[int]:
    """Return the seeds of the splits."""
    return [int(s) for s in np.random.SeedSequence(0).generate_state(N_SPLITS)]


def get_ceiling(tables, full: Profiles, target_p: np.ndarray, name_rank_g: np.ndarray, *, continuity: bool) -> dict:
    """Return the value of each metric for the replicate: half B as a prediction of half A, averaged over splits.

    The fold-change error compares the two halves, but its gene filter and scale come from the full data.
    """
    per_split = []
    for _ in range(N_SPLITS):
        a, b = (make_profiles(next(tables), continuity=continuity) for _ in range(2))
        values = compare(a, b, target_p, name_rank_g)
        means = values.means()
        means[NMAE] = finite_mean(get_nmae(full.de, align(b.de, full.de), align(a.de, full.de), target_p))
        per_split.append(means)
    return {m: float(np.mean([s[m] for s in per_split])) for m in METRICS}


def score_baseline(
    sum_kg, size_k, controls: GeneMajor, real: Profiles, target_p, name_rank_g, *, continuity, threads, progress
) -> Values:
    """Score the mean response: control cells drawn with replacement, with each gene scaled to the perturbation mean.

    The mean of a gene excludes the perturbations that target it.
    """
    mean_kg = sum_kg / size_k[:, None]
    total, count = mean_kg[1:].sum(axis=0), np.full(mean_kg.shape[1], float(len(size_k) - 1))
    row = np.flatnonzero(target_p >= 0)
    np.subtract.at(total, target_p[row], mean_kg[1 + row, target_p[row]])
    np.subtract.at(count, target_p[row], 1.0)
    if (count <= 0).any():
        raise DataError(
            f"{int((count <= 0).sum())} genes are the target of every perturbation, so there is no mean response",
            hint="the baseline needs at least two perturbations with different targets",
        )
    scale_g = np.divide(total / count, mean_kg[0], out=np.zeros_like(total), where=mean_kg[0] > 0)
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.integers(0, controls.n_cells, size=int(n)) for n in size_k[1:]])
    cells = controls.draw(draws, scale_g)
    code = np.concatenate([np.repeat(np.arange(1, len(size_k)), size_k[1:].astype(np.int64)),
                           np.zeros(controls.n_cells)]).astype(np.int32)  # fmt: skip
    (tables,) = make_tables(cells, [(code, 1)], len(size_k), target_sum=TARGET_SUM, threads=threads, progress=progress)
    return compare(real, make_profiles(tables, continuity=continuity), target_p, name_rank_g)


def find_problem(baseline: dict[str, float], ceiling: dict[str, float]) -> str:
    """Return why scores cannot be scaled with the two ends, or ""."""
    for m in METRICS:
        b, r = baseline[m], ceiling[m]
        if not (np.isfinite(b) and np.isfinite(r)):
            return f"{m} cannot be scaled: its baseline is {b:.6g} and its replicate {r:.6g}"
        if not (r < b if m in LOWER_IS_BETTER else r > b):
            return f"{m} cannot be scaled: the replicate ({r:.6g}) is no better than the mean response ({b:.6g})"
    return ""


def scale(metric: str, value: float, baseline: float, ceiling: float) -> tuple[float, float]:
    """Return (score, unclipped score) of a raw value between the two ends.

    A value that is not finite scores 0 in the expression metric, −6 in the fold-change error, and like a raw 0
    otherwise.
    """
    if not np.isfinite(value):
        if metric in LOWER_IS_BETTER:
            return (0.0 if metric == EXPRESSION else NMAE_FLOOR), float("nan")
        value = 0.0
    s = (value - baseline) / (ceiling - baseline)
    if metric == EXPRESSION:
        return min(max(s, 0.0), 1.0), s
    return (max(s, NMAE_FLOOR) if metric == NMAE else s), s
