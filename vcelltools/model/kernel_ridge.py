"""``kernel-ridge``: effects by kernel ridge regression on features of the perturbations.

The perturbation-specific parts of the training effects are regressed on the features, which are scaled as a whole, in
the dual form of ridge regression (Saunders, Gammerman & Vovk 1998), with a linear or a Gaussian kernel. ``nugget`` is
added to the kernel of a perturbation with itself. It stands for the variation that features do not explain, and lets a
perturbation that was measured in other contexts keep part of its own measurement.
"""

from __future__ import annotations

import itertools

import numpy as np

from vcelltools.errors import UsageError, spell
from vcelltools.model.baselines import Effects, PerturbationMean, average_runs

_LEAST = 3


class KernelRidge:
    """Kernel ridge regression of perturbation-specific effects on features."""

    OF_MEASURED = ("nugget",)
    GRID = tuple(
        {"kernel": k, "penalty": p, "nugget": n}
        for n, k, p in itertools.product((1.0, 0.1), ("linear", "gaussian"), (1.0, 0.1, 0.3, 3.0, 10.0, 30.0))
    )

    def __init__(self, effects: Effects, *, kernel: str = "linear", penalty: float = 1.0, nugget: float = 1.0) -> None:
        features = self._need(effects)
        self._mean = PerturbationMean(effects)
        residual_kg = effects.effect_kg - self._mean.common_cg[effects.context_k]
        y_pg, counts = average_runs(effects, residual_kg)
        described = np.isfinite(features).all(axis=1)
        train = np.flatnonzero(described & (counts > 0))
        x = scale_features(features, train)
        gram = _make_gram(x, x[train], kernel)
        gram[train, np.arange(len(train))] += nugget
        dual = np.linalg.solve(gram[train] + penalty * np.eye(len(train)), y_pg[train])
        self._own_pg = gram @ dual
        self._own_pg[~described] = 0.0

    @staticmethod
    def can_fit(effects: Effects) -> bool:
        """Return whether enough training perturbations have features."""
        if effects.features_pf is None:
            return True  # the constructor raises an error that names what is missing
        return int((np.isfinite(effects.features_pf).all(axis=1) & effects.known_p).sum()) >= _LEAST

    def parts(self, pert_q: np.ndarray, context_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shared effects and the regressed perturbation-specific effects."""
        return self._mean.common(pert_q, context_q), self._own_pg[pert_q]

    def _need(self, effects: Effects) -> np.ndarray:
        if effects.features_pf is None:
            hint = f"{spell('features')} FILE; vcelltools features writes one"
            raise UsageError("kernel-ridge needs features of the perturbations", hint=hint, field="features")
        if not self.can_fit(effects):
            n = int((np.isfinite(effects.features_pf).all(axis=1) & effects.known_p).sum())
            raise UsageError(
                f"{n} training perturbations have features, but kernel-ridge needs at least {_LEAST}",
                hint="check that the names in the feature file are those of the perturbations",
            )
        return effects.features_pf


def scale_features(features_pf: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return centred features whose mean squared length over training perturbations is 1; rows of zeros without any.

    The features are scaled as a whole, so the weights that ``features`` gave its sources are kept.
    """
    centred = features_pf - features_pf[train].mean(axis=0)
    length = np.sqrt((centred[train] ** 2).sum(axis=1).mean())
    described = np.isfinite(features_pf).all(axis=1)
    return np.where(described[:, None], centred / (length if length > 0 else 1.0), 0.0)


def _make_gram(x_pf: np.ndarray, train_tf: np.ndarray, kernel: str) -> np.ndarray:
    """Return the kernel (p, t) between all perturbations and the training perturbations."""
    product = x_pf @ train_tf.T
    if kernel == "linear":
        return product
    square = (x_pf**2).sum(axis=1)[:, None] + (train_tf**2).sum(axis=1)[None, :] - 2 * product
    typical = np.median(square[square > 1e-9]) if (square > 1e-9).any() else 1.0
    return np.exp(-np.maximum(square, 0.0) / typical)
