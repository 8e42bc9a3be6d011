"""``neighbours``: predicts the effect of a perturbation from those of its neighbours in a network.

The perturbation-specific part of an effect is the shrunken mean of those of the neighbours,
``sum(w y) / (sum(w) + shrinkage)``. If the perturbation itself was measured in other contexts, it counts as a neighbour
of weight ``itself``. Neighbours come from a network or, without one, are the perturbations with the most similar
features (cosine).
"""

from __future__ import annotations

import numpy as np

from vcelltools.errors import UsageError, spell
from vcelltools.model.baselines import Effects, PerturbationMean, average_runs
from vcelltools.model.kernel_ridge import scale_features

_NEAREST = 10  # number of neighbours by features, if there is no network


class Neighbours:
    """The shrunken mean of the neighbours' effects."""

    OF_MEASURED = ("itself",)
    GRID = tuple({"shrinkage": s, "itself": o} for o in (3.0, 1.0, 10.0) for s in (1.0, 0.5, 2.0, 4.0, 8.0))

    def __init__(self, effects: Effects, *, shrinkage: float = 1.0, itself: float = 3.0) -> None:
        self._mean = PerturbationMean(effects)
        residual_kg = effects.effect_kg - self._mean.common_cg[effects.context_k]
        self._own_pg, counts = average_runs(effects, residual_kg)
        self._weight_pp = get_weights(effects) * (counts > 0)[None, :]
        self._here = counts > 0
        self._shrinkage, self._self_weight = shrinkage, itself

    def parts(self, pert_q: np.ndarray, context_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shared effects, and the shrunken means of the neighbours' perturbation-specific effects."""
        weight = self._weight_pp[pert_q].copy()
        rows = np.flatnonzero(self._here[pert_q])
        weight[rows, pert_q[rows]] = self._self_weight
        total = weight.sum(axis=1, keepdims=True) + self._shrinkage
        return self._mean.common(pert_q, context_q), weight @ self._own_pg / total


def get_weights(effects: Effects) -> np.ndarray:
    """Return the weights (p, p) of each perturbation's neighbours, with zeros on the diagonal."""
    if effects.network_pp is not None:
        weight = np.array(effects.network_pp, np.float64)
    elif effects.features_pf is not None:
        weight = _get_similar(effects.features_pf, effects.known_p)
    else:
        raise UsageError(
            "neighbours needs a network of the perturbations, or their features",
            hint=f"{spell('network')} EDGES.csv or {spell('features')} FILE",
            field="network",
        )
    np.fill_diagonal(weight, 0.0)
    return weight


def _get_similar(features_pf: np.ndarray, known_p: np.ndarray) -> np.ndarray:
    """Return the cosines to the nearest training perturbations by features, and zero for all others."""
    described = np.isfinite(features_pf).all(axis=1)
    from_p = described & known_p
    out = np.zeros((len(features_pf), len(features_pf)))
    if not from_p.any():
        return out
    unit = scale_features(features_pf, np.flatnonzero(from_p))
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosine = np.where(from_p[None, :], unit @ unit.T, 0.0)
    np.fill_diagonal(cosine, 0.0)
    kept = min(_NEAREST, cosine.shape[1])
    least = np.partition(cosine, -kept, axis=1)[:, -kept][:, None]
    return np.where((cosine >= least) & (cosine > 0), cosine, 0.0)
