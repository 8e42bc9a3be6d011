"""Use what the control cells say of a context: how near it is to others, and whether it expresses the target.

Two adjustments of the effects measured in other contexts. They are used only if they lower the squared error of the
plain mean over the other contexts when every training context is left out in turn, by more than two standard errors of
the difference, paired over runs:

- ``half``: a perturbation of a gene that a context hardly expresses does little. Effects are taken as proportional to
  ``x / (x + half)``, where ``x`` is the mean log1p CP10K of the target in the controls of the context. The training
  effects are divided by this factor, with weights by its square, and predictions are multiplied by it. The change of
  the target itself is proportional to its level. Models of ratios, and the objective ``discrimination``, do not use
  it.
- ``width``: a context without perturbed cells is predicted from contexts with weights
  ``exp(-d² / (width · median d²))``, where ``d²`` is the mean squared difference of the controls' means.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from vcelltools.model.baselines import Effects, PerturbationMean, get_mean_knockdown
from vcelltools.model.nested import classify

HALVES = (None, 0.05, 0.2, 0.8)
WIDTHS = (None, 1.0, 0.3, 0.1)
_LEAST_RUNS = 10
_MOST_FOLD = 10.0
_LEAST_FACTOR = 0.3  # runs of targets that are expressed less say nothing about the effect


def get_factors(effects: Effects, half: float | None, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
    """Return the share (q,) of its full effect that a perturbation has in a context; 1 if the target is unknown."""
    out = np.ones(len(pert_q))
    if half is not None:
        rows, _, level = _get_targets(effects, pert_q, context_q)
        out[rows] = level / (level + half)
    return out


def scale(
    effects: Effects, half: float | None, values_qg: np.ndarray, pert_q: np.ndarray, context_q: np.ndarray
) -> np.ndarray:
    """Return full effects as those in contexts: times the factor, and times its level for the targeted gene."""
    if half is None:
        return values_qg
    out = values_qg * get_factors(effects, half, pert_q, context_q)[:, None]
    rows, target, level = _get_targets(effects, pert_q, context_q)
    out[rows, target] = values_qg[rows, target] * level
    return out


def _get_targets(
    effects: Effects, pert_q: np.ndarray, context_q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the requests whose target is known, the target, and its level in the controls of the context."""
    if effects.target_p is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    rows = np.flatnonzero(effects.target_p[pert_q] >= 0)
    target = effects.target_p[pert_q[rows]]
    return rows, target, effects.control_cg[context_q[rows], target]


def adjust(effects: Effects, half: float | None, width: float | None) -> Effects:
    """Return the training runs as effects of fully expressed targets, and with a width for :meth:`Effects.toward`."""
    e = replace(effects, width=width)
    if half is None:
        return e
    factor = get_factors(e, half, e.pert_k, e.context_k)
    e, factor = e.select(factor >= _LEAST_FACTOR), factor[factor >= _LEAST_FACTOR]
    full = e.effect_kg / factor[:, None]
    rows, target, level = _get_targets(e, e.pert_k, e.context_k)
    full[rows, target] = np.clip(e.effect_kg[rows, target] / np.maximum(level, 1e-6), -1.0, _MOST_FOLD)
    nearness = factor**2 if e.nearness_k is None else e.nearness_k * factor**2
    return replace(e, effect_kg=full, nearness_k=nearness)


def choose(effects: Effects, *, halves: tuple[float | None, ...] = HALVES) -> tuple[float | None, float | None]:
    """Return the half and the width that predict left-out training contexts best, or None for each."""
    contexts = np.unique(effects.context_k)
    genuine = np.ones(len(effects.pert_k), bool) if effects.borrowed_k is None else ~effects.borrowed_k
    if len(contexts) < 2 or genuine.sum() < _LEAST_RUNS:
        return None, None
    best: tuple[float | None, float | None] = (None, None)
    plain, gained = np.zeros(0), 0.0
    for half, width in itertools.product(halves, WIDTHS):
        error = _get_errors(effects, contexts, half, width)[genuine]
        if half is None and width is None:
            plain = error
        gain = plain - error
        if gain.mean() > max(gained, 2 * gain.std(ddof=1) / np.sqrt(len(gain))):
            best, gained = (half, width), float(gain.mean())
    return best


def _get_errors(effects: Effects, contexts: np.ndarray, half: float | None, width: float | None) -> np.ndarray:
    """Return the squared error (k,) of each run, predicted from the other contexts."""
    out = np.zeros(len(effects.pert_k))
    for c in contexts:
        rows = np.flatnonzero(effects.context_k == c)
        pert, context = effects.pert_k[rows], effects.context_k[rows]
        inner = adjust(effects.select(effects.context_k != c), half, width)
        predicted = np.zeros((len(rows), effects.effect_kg.shape[1]))
        if len(inner.pert_k):
            predicted = PerturbationMean(inner.toward(int(c))).predict(pert, context)
            predicted = scale(effects, half, predicted, pert, context)
        out[rows] = ((predicted - effects.effect_kg[rows]) ** 2).sum(axis=1)
    return out


class Contextual:
    """A model of effects on adjusted training runs."""

    def __init__(
        self, fit: Callable[[Effects], Any], effects: Effects, half: float | None, width: float | None
    ) -> None:
        self._e, self.half, self.width = effects, half, width
        self._adjusted = adjust(effects, half, width)
        self._model = fit(self._adjusted)
        self._knockdown = get_mean_knockdown(effects)

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g)."""
        return self._scale(self._model.predict(pert_q, context_q), pert_q, context_q)

    def predict_for(self, objective: str, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g) of a nested model under an objective."""
        return self._scale(self._model.predict_for(objective, pert_q, context_q), pert_q, context_q)

    def describe(self, pert_q: np.ndarray, context_q: np.ndarray) -> dict[str, Any]:
        """Return the choices behind some predictions, with the half and the width."""
        own = {"half": self.half, "width": self.width}
        return {kind: {**choice, **own} for kind, choice in self._model.describe(pert_q, context_q).items()}

    def _scale(self, values_qg: np.ndarray, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        out = scale(self._e, self.half, values_qg, pert_q, context_q)
        if self.half is not None and self._knockdown is not None:
            rows, target, level = _get_targets(self._e, pert_q, context_q)
            kinds = classify(self._adjusted, pert_q[rows], context_q[rows])
            nowhere = ~np.array([k.elsewhere for k in kinds], bool)
            out[rows[nowhere], target[nowhere]] = self._knockdown * level[nowhere]
        return out
