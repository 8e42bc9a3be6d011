"""The evaluation slice while training: how well predicted effects match measured ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slice:
    """Scores over the held-out runs of all contexts."""

    pds: float
    """Perturbation discrimination score by L1, own gene left out: 1 perfect, 0.5 chance."""
    pearson_delta: float
    """Mean Pearson correlation of predicted and measured effect."""
    mae: float
    """Mean absolute error of the effect."""
    pds_k: np.ndarray
    """PDS of each run."""
    pearson_k: np.ndarray
    """Pearson correlation of each run; 0 where either effect is constant."""

    def to_json(self) -> dict[str, float | int]:
        """Return the means and the number of runs."""
        return {"pds": self.pds, "pearson_delta": self.pearson_delta, "mae": self.mae, "n": len(self.pds_k)}


def evaluate_effects(
    predicted_kg: np.ndarray,
    measured_kg: np.ndarray,
    context_k: np.ndarray,
    target_k: np.ndarray | None = None,
    *,
    rival_rg: np.ndarray | None = None,
    rival_context_r: np.ndarray | None = None,
) -> Slice:
    """Return the slice for runs (k, g); discrimination is among the runs of one context.

    ``target_k`` is the column of each run's own gene (-1 without one), left out of its distances. ``rival_rg``:
    measured effects of further runs, in the contexts ``rival_context_r``, that a run is to be told apart from.
    """
    predicted, measured = np.asarray(predicted_kg, np.float64), np.asarray(measured_kg, np.float64)
    pds_k = np.full(len(measured), 0.5)
    for c in np.unique(context_k):
        rows = np.flatnonzero(context_k == c)
        among = measured[rows]
        if rival_rg is not None and rival_context_r is not None:
            among = np.concatenate([among, np.asarray(rival_rg, np.float64)[rival_context_r == c]])
        if len(among) < 2:
            continue
        for i, k in enumerate(rows):
            difference = np.abs(among - predicted[k])
            distance = difference.sum(axis=1)
            if target_k is not None and target_k[k] >= 0:
                distance -= difference[:, target_k[k]]
            closer = np.sum(distance < distance[i]) + 0.5 * (np.sum(distance == distance[i]) - 1)
            pds_k[k] = 1.0 - closer / (len(among) - 1)
    pearson_k = correlate_rows(predicted, measured)
    mae = float(np.mean(np.abs(predicted - measured)))
    return Slice(float(pds_k.mean()), float(pearson_k.mean()), mae, pds_k, pearson_k)


def correlate_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each pair of rows; 0 where one is constant."""
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(norm > 1e-12, (a * b).sum(axis=1) / np.where(norm > 1e-12, norm, 1.0), 0.0)
