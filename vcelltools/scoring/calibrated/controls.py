"""Calibrate metrics with a positive and a negative control: does a metric distinguish good predictions on this data?

The true cells of each perturbation are split in halves. The first half is the truth of the calibration. The *positive
control* is the interpolated duplicate of Miller et al. 2025 (doi 10.1101/2025.10.20.683304). It interpolates between
the second half, for genes that are differentially expressed in it, and the mean of the other perturbations, for other
genes, as α · half + (1 − α) · mean with α = 1 − adjusted p. *Negative controls* have no information on the
perturbation: the mean of the other perturbations, the mean of the controls, or the mean of all perturbations. For
rankings of genes, the positive control is the second half, and the negative control compares the other perturbed cells
with the controls.

Two values follow for each metric (Schäfer et al. 2026, doi 10.64898/2026.07.23.740433): the Dynamic Range Fraction of
each perturbation, clip((pos − neg)/(perfect − neg), −1, 1), and the Bound Discrimination Score, the share of
perturbations for which the positive control is better than the negative one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.scoring.calibrated.metrics import NEGATIVES, Candidate, View, compute_metrics
from vcelltools.scoring.calibrated.moments import Moments, Welch, compare_means, make_moments
from vcelltools.scoring.cell_eval.rules import METRICS
from vcelltools.scoring.result import Calibration

MIN_CELLS = 30
"""Perturbations with fewer true cells are not calibrated."""
LITTLE_RANGE, LITTLE_WINS = 0.1, 0.6
"""Minimum mean Dynamic Range Fraction and Bound Discrimination Score of a metric that discriminates on the data."""
_SMALL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Population:
    """Sums over all perturbed cells, to compute the moments without each perturbation.

    Attributes
    ----------
    size, sum_g, square_g
        Number of cells, sums and sums of squares.
    """

    size: int
    sum_g: np.ndarray
    square_g: np.ndarray

    def leave_out(self, size_p: np.ndarray, sum_pg: np.ndarray, square_pg: np.ndarray) -> Moments:
        """Return the moments of all cells except those of each perturbation."""
        return make_moments(self.size - size_p, self.sum_g - sum_pg, self.square_g - square_pg)


def mean_of_others(mean_pg: np.ndarray) -> np.ndarray:
    """Return (p, g) the mean of all other rows for each row; zero if there is only one."""
    return (mean_pg.sum(axis=0) - mean_pg) / max(len(mean_pg) - 1, 1)


def make_view(truth: Moments, mean_pg: np.ndarray, reference: Moments, control_g: np.ndarray, threads: int = 1) -> View:
    """Return the truth to compare profiles with; ``truth`` are moments of cells, ``mean_pg`` means of all cells."""
    return View(
        mean_pg=truth.mean_kg, control_g=control_g, others_pg=mean_of_others(mean_pg),
        effects=compare_means(truth, reference, threads=threads),
    )  # fmt: skip


def make_negatives(mean_pg: np.ndarray, reference: Moments, control: Moments) -> dict[str, Candidate]:
    """Return the negative controls by name."""
    strength = np.abs(compare_means(reference, control, with_p=False).t_pg)
    everything = np.broadcast_to(mean_pg.mean(axis=0), mean_pg.shape)
    others = mean_of_others(mean_pg)
    return {
        "others": Candidate(mean_pg=others, strength_pg=strength),
        "control": Candidate(mean_pg=np.broadcast_to(control.mean_kg[0], mean_pg.shape), strength_pg=strength),
        "everything": Candidate(mean_pg=everything, strength_pg=strength),
        "reference": Candidate(mean_pg=others, strength_pg=strength),
    }


def make_positive(half: Moments, others_pg: np.ndarray, reference: Moments, threads: int = 1) -> Candidate:
    """Return the interpolated duplicate of a half, and the ranking of the genes by that half."""
    found: Welch = compare_means(half, reference, threads=threads)
    alpha = 1 - found.padj_pg
    return Candidate(mean_pg=alpha * half.mean_kg + (1 - alpha) * others_pg, strength_pg=np.abs(found.t_pg))


def split_wanted(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return {negative control: its metrics}."""
    return {c: tuple(m for m in names if NEGATIVES[m] == c) for c in dict.fromkeys(NEGATIVES[m] for m in names)}


def compute_negative(
    view: View, negatives: dict[str, Candidate], names: list[str], threads: int = 1
) -> dict[str, np.ndarray]:
    """Return {metric: (p,) values of its negative control}."""
    found = compute_metrics(view, negatives, split_wanted(names), threads)
    return {m: found[NEGATIVES[m]][m] for m in names}


def calibrate(
    first: Moments,
    second: Moments,
    whole: Moments,
    reference: Moments,
    control: Moments,
    names: list[str],
    threads: int = 1,
) -> dict[str, tuple[Calibration, np.ndarray]]:
    """Calibrate metrics on the halves of the truth.

    Parameters
    ----------
    first, second, whole
        Both halves of every perturbation, and all of its cells.
    reference
        All perturbed cells except those of each perturbation.
    control
        The controls, in one row.

    Returns
    -------
    dict
        By metric, its calibration, and (p,) the Dynamic Range Fraction of each perturbation.
    """
    view = make_view(first, whole.mean_kg, reference, control.mean_kg[0], threads)
    positive = make_positive(second, view.others_pg, reference, threads)
    good = compute_metrics(view, {"positive": positive}, {"positive": tuple(names)}, threads)["positive"]
    bad = compute_negative(view, make_negatives(whole.mean_kg, reference, control), names, threads)
    return {m: judge(good[m], bad[m], float(METRICS[m].best or 0)) for m in names}


def judge(positive_p: np.ndarray, negative_p: np.ndarray, perfect: float) -> tuple[Calibration, np.ndarray]:
    """Return a metric's calibration from the values of both controls, and (p,) Dynamic Range Fractions.

    The fraction is undefined if the negative control is undefined, or better than a perfect prediction. As in
    scPertEval, 1e-6 is added to the denominator, and an undefined positive control counts as not better.
    """
    sign = 1.0 if perfect == 1 else -1.0
    gain, room = sign * (positive_p - negative_p), sign * (perfect - negative_p)
    drf = np.where(np.isfinite(negative_p) & (room >= 0), np.clip(gain / (room + _SMALL), -1, 1), np.nan)
    some = drf[~np.isnan(drf)]

    def mean(values: np.ndarray) -> float | None:
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if len(finite) else None

    share, wins = mean(drf), float((gain > 0).mean()) if np.isfinite(gain).any() else None
    return Calibration(
        drf=share,
        drf_median=float(np.median(some)) if len(some) else None,
        bds=wins,
        positive=mean(positive_p),
        negative=mean(negative_p),
        n=len(some),
        discriminates=share is not None and wins is not None and share >= LITTLE_RANGE and wins >= LITTLE_WINS,
    ), drf
