"""Baselines on pseudobulks (control mean, perturbation mean, ridge), and the prior effects of the transformer.

A *run* is one perturbation in one context. Its *effect* is the mean of its cells minus the mean of the context's
control cells, per gene, in log1p CP10K. Every model predicts the effects of the requested runs and never uses a run to
predict itself: if a training run is requested, the model leaves it out. Predictions of training and held-out runs
therefore have the same quality and can be inputs of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vcelltools.errors import UsageError

LAMBDAS = tuple(10.0**e for e in np.arange(-3, 4.5, 0.5))
_LEAST_WEIGHT = 1e-6  # cells; anything below is the rounding of a subtraction
_POOLED_PERTURBATIONS = 30.0  # weight of the ratio pooled over all genes in the ratio of one gene


@dataclass(frozen=True, kw_only=True)
class Pseudobulk:
    """Mean CP10K values, without a logarithm."""

    cp10k_kg: np.ndarray
    """float (k, g): mean of each training run."""
    base_kg: np.ndarray
    """float (k, g): mean of the controls, weighted by the batches of each training run."""
    control_cg: np.ndarray
    """float (c, g): mean of each context's controls."""
    share_cg: np.ndarray
    """float (c, g): share of each context's controls that express a gene."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The effects of the training runs, and further inputs of the models."""

    effect_kg: np.ndarray
    """float (k, g): effect of each training run."""
    pert_k: np.ndarray
    """int (k,): perturbation of each run."""
    context_k: np.ndarray
    """int (k,): context of each run."""
    cells_k: np.ndarray
    """int (k,): number of cells of each run."""
    control_cg: np.ndarray
    """float (c, g): mean of each context's control cells."""
    n_perturbations: int
    target_p: np.ndarray | None = None
    """int (p,): column of the targeted gene, -1 if it is not among the genes."""
    features_pf: np.ndarray | None = None
    """float (p, f): features of each perturbation; rows of NaN if it has none."""
    network_pp: np.ndarray | None = None
    """float (p, p): edge weights of a network between perturbations; the diagonal is ignored."""
    pseudobulk: Pseudobulk | None = None
    """Mean CP10K values, which only models of ratios need."""
    direction_k: np.ndarray | None = None
    """int (k,): direction of each run, -1 if it is unknown; None if no direction is known."""
    direction_pc: np.ndarray | None = None
    """int (p, c): direction in which each perturbation is requested in each context."""
    borrowed_k: np.ndarray | None = None
    """bool (k,): runs that were converted from another direction; models learn from them, but are not scored on them.
    See :mod:`vcelltools.model.direction`."""
    parts_p: Mapping[int, tuple[int, ...]] | None = None
    """The parts of each perturbation that is a combination; see :mod:`vcelltools.model.combination`."""
    nearness_k: np.ndarray | None = None
    """float (k,): weight of each run besides its number of cells; None for 1."""
    width: float | None = None
    """Width of the weights of :meth:`toward`; see :mod:`vcelltools.model.context`."""

    def select(self, rows: np.ndarray) -> Effects:
        """Return a copy with only the given training runs (positions or a mask)."""
        by_run = ("effect_kg", "pert_k", "context_k", "cells_k", "direction_k", "borrowed_k", "nearness_k")
        part = {k: values[rows] for k in by_run if (values := getattr(self, k)) is not None}
        bulk = self.pseudobulk
        if bulk is not None:
            bulk = replace(bulk, cp10k_kg=bulk.cp10k_kg[rows], base_kg=bulk.base_kg[rows])
        return replace(self, **part, pseudobulk=bulk)

    @property
    def weight_k(self) -> np.ndarray:
        """float (k,): number of cells of each run, times its nearness."""
        cells = self.cells_k.astype(np.float64)
        return cells if self.nearness_k is None else cells * self.nearness_k

    def toward(self, context: int) -> Effects:
        """Return a copy that weighs runs by how similar the controls of their contexts are to those of ``context``."""
        if self.width is None or not len(self.pert_k):
            return self
        square_c = ((self.control_cg - self.control_cg[context]) ** 2).mean(axis=1)
        square_k = square_c[self.context_k]
        typical = np.median(square_c[np.unique(self.context_k)])
        near = np.exp(-(square_k - square_k.min()) / max(self.width * float(typical), 1e-12))
        return replace(self, nearness_k=near if self.nearness_k is None else near * self.nearness_k)

    def get_directions(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the directions (q,) of requests, -1 if they are unknown."""
        if self.direction_k is None or self.direction_pc is None:
            return np.full(len(pert_q), -1)
        return self.direction_pc[pert_q, context_q]

    @property
    def known_p(self) -> np.ndarray:
        """bool (p,): perturbations with at least one training run."""
        known = np.zeros(self.n_perturbations, bool)
        known[self.pert_k] = True
        return known


class EffectModel(Protocol):
    """A fitted model that predicts effects."""

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g) of perturbations in contexts, float64."""


def fit_prior(kind: str, effects: Effects) -> EffectModel:
    """Fit and return the prior of a transformer: ``additive``, ``ridge``, ``perturbation-mean`` or ``none``."""
    if kind not in PRIORS:
        raise UsageError(f"prior {kind!r} is not known", hint=f"one of: {', '.join(PRIORS)}")
    return PRIORS[kind](effects)


class ControlMean:
    """Predict no effect."""

    def __init__(self, effects: Effects) -> None:
        self._genes = effects.effect_kg.shape[1]

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return zeros."""
        return np.zeros((len(pert_q), self._genes))


def _mean_by(values_kg: np.ndarray, weight_k: np.ndarray, group_k: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted sums (n, g) and the total weights (n,) of each group."""
    total = np.zeros((n, values_kg.shape[1]))
    np.add.at(total, group_k, values_kg * weight_k[:, None])
    return total, np.bincount(group_k, weight_k, n)


def average_runs(effects: Effects, values_kg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means (p, g) of values over each perturbation's runs, weighted by cells, and the cells (p,)."""
    total, cells = _mean_by(values_kg, effects.weight_k, effects.pert_k, effects.n_perturbations)
    return total / np.where(cells > _LEAST_WEIGHT, cells, 1.0)[:, None], np.where(cells > _LEAST_WEIGHT, cells, 0.0)


def mean_by_context(effects: Effects, values_kg: np.ndarray) -> np.ndarray:
    """Return the mean (c, g) of values over each context's runs, and over all runs for a context without any."""
    sums, counts = _mean_by(values_kg, np.ones(len(effects.pert_k)), effects.context_k, len(effects.control_cg))
    overall = np.average(values_kg, axis=0, weights=effects.nearness_k)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], overall)


class PerturbationMean:
    """Predict the mean effect of the perturbation in the other contexts, weighted by cells.

    A perturbation without other contexts gets the mean effect of all perturbations in the requested context if it has
    training runs, otherwise in all contexts.
    """

    def __init__(self, effects: Effects) -> None:
        e = self._e = effects
        self.weight_k = e.weight_k
        self._sum_pg, self._weight_p = _mean_by(e.effect_kg, self.weight_k, e.pert_k, e.n_perturbations)
        self._run = {(int(p), int(c)): k for k, (p, c) in enumerate(zip(e.pert_k, e.context_k, strict=True))}
        self.common_cg = mean_by_context(e, e.effect_kg)
        self._count_c = np.bincount(e.context_k, minlength=len(e.control_cg))

    def elsewhere(self, pert_q: np.ndarray, context_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean effects (q, g) over the other contexts and their numbers of cells (q,), which may be 0."""
        total, weight = self._sum_pg[pert_q], self._weight_p[pert_q]
        for i, key in enumerate(zip(map(int, pert_q), map(int, context_q), strict=True)):
            if (k := self._run.get(key)) is not None:
                total[i] -= self._e.effect_kg[k] * self.weight_k[k]
                weight[i] -= self.weight_k[k]
        weight = np.where(weight > _LEAST_WEIGHT, weight, 0.0)
        return np.where(weight[:, None] > 0, total / np.where(weight > 0, weight, 1.0)[:, None], 0.0), weight

    def common(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the mean effect (q, g) of all perturbations in the context, without the requested run."""
        out = self.common_cg[context_q]
        for i, key in enumerate(zip(map(int, pert_q), map(int, context_q), strict=True)):
            if (k := self._run.get(key)) is not None and self._count_c[key[1]] > 1:
                n = self._count_c[key[1]]
                out[i] = (out[i] * n - self._e.effect_kg[k]) / (n - 1)
        return out

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the mean over other contexts, or the mean of all perturbations if there are none."""
        mean, weight = self.elsewhere(pert_q, context_q)
        return np.where(weight[:, None] > 0, mean, self.common(pert_q, context_q))


class Ridge:
    """Shrink effects from other contexts, or predict them by ridge regression on features.

    - Perturbations measured in other contexts: the mean over these contexts minus the shared effect of all
      perturbations, shrunken per gene by its signal-to-noise ratio (estimated from the agreement between contexts), is
      added to the shared effect in the requested context.
    - Perturbations measured nowhere: a kernel ridge regression on the features (standardised, with the penalty of the
      smallest exact leave-one-out error) is added to the shared effect. The targeted gene is set to the mean relative
      knock-down of the measured targets.
    """

    def __init__(self, effects: Effects) -> None:
        self._e = e = effects
        self._mean = PerturbationMean(e)
        shared = self._mean.common(e.pert_k, e.context_k)
        residual_kg = e.effect_kg - shared
        self.ratio_g = _signal_to_noise(residual_kg, e.pert_k, e.context_k, e.cells_k)
        centred = replace(e, effect_kg=residual_kg)
        self._residual = PerturbationMean(centred)
        self._kernel = _KernelRidge(e, residual_kg) if e.features_pf is not None else None
        self._knockdown = get_mean_knockdown(e)

    @property
    def penalty(self) -> float | None:
        """Ridge penalty with the smallest leave-one-out error; None without features."""
        return self._kernel.penalty if self._kernel else None

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the shrunken effect if other contexts have one, otherwise that of the regression."""
        shared = self._mean.common(pert_q, context_q)
        elsewhere, cells = self._residual.elsewhere(pert_q, context_q)
        out = shared + elsewhere * self._weight(cells)
        nowhere = np.flatnonzero(cells == 0)
        if len(nowhere):
            out[nowhere] = self.predict_unseen(pert_q[nowhere], context_q[nowhere])
        return out

    def predict_unseen(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the effects (q, g) as if the perturbations had been measured in no context."""
        out = self._mean.common(pert_q, context_q)
        if self._kernel is not None:
            out = out + self._kernel.predict(pert_q)
        self._set_knockdown(out, np.arange(len(out)), pert_q, context_q)
        return out

    def _weight(self, cells_q: np.ndarray) -> np.ndarray:
        """Return the shrinkage factors (q, g) of effects measured on ``cells_q`` cells."""
        information = self.ratio_g[None, :] * cells_q[:, None]
        return information / (1.0 + information)

    def _set_knockdown(self, out: np.ndarray, rows: np.ndarray, pert_q: np.ndarray, context_q: np.ndarray) -> None:
        if self._e.target_p is None or self._knockdown is None:
            return
        target = self._e.target_p[pert_q[rows]]
        inside = target >= 0
        own = self._e.control_cg[context_q[rows[inside]], target[inside]]
        out[rows[inside], target[inside]] = self._knockdown * own


class Additive(Ridge):
    """Add the shared effect in the context and the perturbation-specific effect in other contexts, without shrinkage.

    The transformer starts from this prior. Shrinkage lowers the error but makes all effects more similar, which lowers
    the discrimination, so the network learns how much to shrink.
    """

    def _weight(self, cells_q: np.ndarray) -> np.ndarray:
        return np.ones((len(cells_q), 1))


def _signal_to_noise(
    effect_kg: np.ndarray, pert_k: np.ndarray, context_k: np.ndarray, cells_k: np.ndarray
) -> np.ndarray:
    """Return, per gene, the variance of the true effects over the noise variance of an effect measured on one cell.

    Effects of one perturbation in two contexts share the true effect but not the noise, so the mean of their products
    estimates the variance of the true effects. The ratio of each gene is pooled with that of all genes.
    """
    order = np.lexsort((context_k, pert_k))
    total = np.zeros((2, effect_kg.shape[1]))  # rows: signal, and noise of one cell
    pairs = 0
    starts = np.flatnonzero(np.r_[True, np.diff(pert_k[order]) != 0])
    for a, b in zip(starts, np.r_[starts[1:], len(order)], strict=True):
        runs = order[a:b]
        if len(runs) < 2:
            continue
        y, m = effect_kg[runs], len(runs)
        product = (y.sum(axis=0) ** 2 - (y**2).sum(axis=0)) / (m * (m - 1))
        noise = ((y**2).mean(axis=0) - product) / np.mean(1.0 / cells_k[runs])
        total += np.stack([product, noise])
        pairs += 1
    if not pairs:
        return np.full(effect_kg.shape[1], 1e12)  # the noise cannot be estimated, so nothing is shrunken
    signal, noise = np.maximum(total / pairs, 0.0)
    overall = signal.sum() / max(noise.sum(), 1e-12)
    noise = np.maximum(noise, 1e-12 + 1e-3 * noise.mean())
    return (pairs * signal / noise + _POOLED_PERTURBATIONS * overall) / (pairs + _POOLED_PERTURBATIONS)


def get_mean_knockdown(e: Effects) -> float | None:
    """Return the mean relative change of the targeted gene over the training runs, weighted by its expression."""
    if e.target_p is None:
        return None
    target = e.target_p[e.pert_k]
    rows = np.flatnonzero(target >= 0)
    if not len(rows):
        return None
    own = e.control_cg[e.context_k[rows], target[rows]]
    change = e.effect_kg[rows, target[rows]]
    return float(change.sum() / max(own.sum(), 1e-12)) if own.sum() > 0 else None


class _KernelRidge:
    """Ridge regression of the perturbations' mean residual effects on standardised features, in its dual form."""

    def __init__(self, e: Effects, residual_kg: np.ndarray) -> None:
        assert e.features_pf is not None
        described = np.isfinite(e.features_pf).all(axis=1)
        train = np.flatnonzero(described & e.known_p)
        if len(train) < 3:
            raise UsageError(
                f"{len(train)} training perturbations have features, but ridge needs at least 3",
                hint="check that the names in the feature file are those of the perturbations",
            )
        sums, weights = _mean_by(residual_kg, np.ones(len(e.pert_k)), e.pert_k, e.n_perturbations)
        y = sums[train] / weights[train][:, None]
        mean, scale = e.features_pf[train].mean(axis=0), e.features_pf[train].std(axis=0)
        scaled = np.where(described[:, None], (e.features_pf - mean) / np.where(scale > 0, scale, 1.0), 0.0)
        gram = scaled @ scaled[train].T / scaled.shape[1]
        values, vectors = np.linalg.eigh(gram[train])
        values = np.maximum(values, 0.0)
        rotated = vectors.T @ y
        best = (np.inf, 0.0)
        for penalty in LAMBDAS:
            hat = (vectors**2) @ (values / (values + penalty))
            fitted = vectors @ (rotated * (values / (values + penalty))[:, None])
            error = float(np.mean(((y - fitted) / np.maximum(1.0 - hat, 1e-9)[:, None]) ** 2))
            best = min(best, (error, penalty))
        self.penalty = best[1]
        shrink = values / (values + self.penalty)
        hat = (vectors**2) @ shrink
        fitted = vectors @ (rotated * shrink[:, None])
        dual = vectors @ (rotated / (values + self.penalty)[:, None])
        self._all_pg = gram @ dual
        self._all_pg[~described] = 0.0
        self._all_pg[train] = y - (y - fitted) / np.maximum(1.0 - hat, 1e-9)[:, None]  # leave-one-out predictions

    def predict(self, pert_q: np.ndarray) -> np.ndarray:
        """Return the residual effects (q, g); training perturbations are predicted from all others."""
        return self._all_pg[pert_q]


def restore_spread(
    effect_qg: np.ndarray, prior_qg: np.ndarray, shared_qg: np.ndarray, limit: float = 3.0
) -> np.ndarray:
    """Return effects whose perturbation-specific part has the same size as in the prior.

    A prediction that minimises an error is the mean of the possible effects, which is smaller than each of them.
    Predictions of weak effects then become similar, and discrimination suffers. This function stretches the part beyond
    the shared effect to its length in the prior. It never shrinks it, and it stretches at most ``limit``-fold.
    """
    own, was = effect_qg - shared_qg, prior_qg - shared_qg
    length = np.linalg.norm(own, axis=1)
    ratio = np.linalg.norm(was, axis=1) / np.where(length > 0, length, 1.0)
    return shared_qg + own * np.clip(ratio, 1.0, limit)[:, None]


BASELINES: dict[str, Callable[[Effects], EffectModel]] = {
    "control-mean": ControlMean,
    "perturbation-mean": PerturbationMean,
    "ridge": Ridge,
}
PRIORS: dict[str, Callable[[Effects], EffectModel]] = {
    "additive": Additive,
    "ridge": Ridge,
    "perturbation-mean": PerturbationMean,
    "none": ControlMean,
}
