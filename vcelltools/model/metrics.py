"""Scores of predicted effects on held-out runs, computed during training."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Slice:
    """Scores over the held-out runs of all contexts."""

    pds: float
    """Perturbation discrimination score by L1 without the targeted gene; 1 is perfect, 0.5 is chance."""
    pearson_delta: float
    """Mean Pearson correlation of predicted and measured effects."""
    mae: float
    """Mean absolute error of the effect."""
    pds_k: np.ndarray
    """PDS of each run."""
    pearson_k: np.ndarray
    """Pearson correlation of each run; 0 if either effect is constant."""
    mae_k: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Mean absolute error of each run."""
    error: float = float("nan")
    """Squared error over that of predicting no effect; below 1 is better than no effect."""
    relative_mae: float = float("nan")
    """Mean absolute error over that of predicting no effect."""

    def to_json(self) -> dict[str, float | int]:
        """Return the means and the number of runs."""
        return {
            "pds": self.pds, "pearson_delta": self.pearson_delta, "mae": self.mae, "error": self.error,
            "n": len(self.pds_k),
        }  # fmt: skip


def evaluate_effects(
    predicted_kg: np.ndarray,
    measured_kg: np.ndarray,
    context_k: np.ndarray,
    target_k: np.ndarray | None = None,
    *,
    rival_rg: np.ndarray | None = None,
    rival_context_r: np.ndarray | None = None,
) -> Slice:
    """Return the scores of runs (k, g); discrimination compares runs of one context.

    ``target_k`` is the column of the targeted gene of each run (-1 without one), which its distances exclude.
    ``rival_rg`` are measured effects of further runs, in the contexts ``rival_context_r``, to compare with.
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
    difference = predicted - measured
    mae_k = np.abs(difference).mean(axis=1)
    nothing, least = float(np.abs(measured).mean()), 1e-12
    return Slice(
        pds=float(pds_k.mean()),
        pearson_delta=float(pearson_k.mean()),
        mae=float(mae_k.mean()),
        pds_k=pds_k,
        pearson_k=pearson_k,
        mae_k=mae_k,
        error=float((difference**2).sum() / max(float((measured**2).sum()), least)),
        relative_mae=float(mae_k.mean() / max(nothing, least)),
    )


def correlate_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each pair of rows; 0 if one is constant."""
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(norm > 1e-12, (a * b).sum(axis=1) / np.where(norm > 1e-12, norm, 1.0), 0.0)
