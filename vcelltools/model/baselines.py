"""Baselines on pseudobulks: control mean, perturbation mean, ridge; and the prior that the transformer starts from.

A *run* is one perturbation in one context; its *effect* is the mean of its cells minus the mean of the context's
control cells, per gene, log1p CP10K. Every model answers the same question, the effects of the runs asked for, and
never uses a run to predict itself: asked for a training run it leaves that run out, so that its answers on training
and held-out runs have the same quality. That is what makes them fit to be a network's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vcelltools.errors import UsageError

LAMBDAS = tuple(10.0**e for e in np.arange(-3, 4.5, 0.5))
_POOLED_PERTURBATIONS = 30.0  # weight of all genes' signal-to-noise ratio in one gene's


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The training runs, and what is known beside them."""

    effect_kg: np.ndarray
    """float (k, g): effect of each training run."""
    pert_k: np.ndarray
    """int (k,): perturbation of each run."""
    context_k: np.ndarray
    """int (k,): context of each run."""
    cells_k: np.ndarray
    """int (k,): cells of each run."""
    control_cg: np.ndarray
    """float (c, g): mean of each context's control cells."""
    n_perturbations: int
    target_p: np.ndarray | None = None
    """int (p,): column of the perturbation's own gene, -1 where it is not among the genes."""
    features_pf: np.ndarray | None = None
    """float (p, f): description of each perturbation; NaN rows are perturbations without one."""

    @property
    def known_p(self) -> np.ndarray:
        """bool (p,): perturbations with at least one training run."""
        known = np.zeros(self.n_perturbations, bool)
        known[self.pert_k] = True
        return known


class EffectModel(Protocol):
    """A model of effects: arrays in, effects out."""

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g) of perturbations in contexts, float64."""


def fit_baseline(kind: str, effects: Effects) -> EffectModel:
    """Return the fitted baseline ``control-mean``, ``perturbation-mean`` or ``ridge``."""
    if kind not in BASELINES:
        raise UsageError(f"baseline {kind}: unknown", hint=", ".join(BASELINES))
    return BASELINES[kind](effects)


def fit_prior(kind: str, effects: Effects) -> EffectModel:
    """Return what a transformer starts from: ``additive``, ``ridge``, ``perturbation-mean`` or ``none``."""
    if kind not in PRIORS:
        raise UsageError(f"prior {kind}: unknown", hint=", ".join(PRIORS))
    return PRIORS[kind](effects)


class ControlMean:
    """No effect at all."""

    def __init__(self, effects: Effects) -> None:
        self._genes = effects.effect_kg.shape[1]

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return zeros."""
        return np.zeros((len(pert_q), self._genes))


def _mean_by(values_kg: np.ndarray, weight_k: np.ndarray, group_k: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted sums (n, g) and weights (n,) by group."""
    total = np.zeros((n, values_kg.shape[1]))
    np.add.at(total, group_k, values_kg * weight_k[:, None])
    return total, np.bincount(group_k, weight_k, n)


class PerturbationMean:
    """The perturbation's mean effect in the other contexts, weighted by cells.

    A perturbation without one gets the mean effect of all perturbations: of the same context where it has training
    runs, else of all.
    """

    def __init__(self, effects: Effects) -> None:
        e = self._e = effects
        self._n_contexts = len(e.control_cg)
        self._weight_k = e.cells_k.astype(np.float64)
        self._sum_pg, self._weight_p = _mean_by(e.effect_kg, self._weight_k, e.pert_k, e.n_perturbations)
        self._run = {(int(p), int(c)): k for k, (p, c) in enumerate(zip(e.pert_k, e.context_k, strict=True))}
        ones = np.ones(len(e.pert_k))
        sums, counts = _mean_by(e.effect_kg, ones, e.context_k, self._n_contexts)
        overall = e.effect_kg.mean(axis=0)
        self.common_cg = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], overall)
        self._count_c = counts

    def elsewhere(self, pert_q: np.ndarray, context_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean effects (q, g) over the other contexts and their cells (q,), 0 where there are none."""
        total, weight = self._sum_pg[pert_q], self._weight_p[pert_q]
        for i, key in enumerate(zip(map(int, pert_q), map(int, context_q), strict=True)):
            if (k := self._run.get(key)) is not None:
                total[i] -= self._e.effect_kg[k] * self._weight_k[k]
                weight[i] -= self._weight_k[k]
        weight = np.where(weight > 0.5, weight, 0.0)  # cells are whole: what is left of rounding is none
        return np.where(weight[:, None] > 0, total / np.maximum(weight, 1)[:, None], 0.0), weight

    def common(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the mean effect (q, g) of all perturbations in the context, the run asked for left out."""
        out = self.common_cg[context_q]
        for i, key in enumerate(zip(map(int, pert_q), map(int, context_q), strict=True)):
            if (k := self._run.get(key)) is not None and self._count_c[key[1]] > 1:
                n = self._count_c[key[1]]
                out[i] = (out[i] * n - self._e.effect_kg[k]) / (n - 1)
        return out

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the mean elsewhere, else the mean of all perturbations."""
        mean, weight = self.elsewhere(pert_q, context_q)
        return np.where(weight[:, None] > 0, mean, self.common(pert_q, context_q))


class Ridge:
    """Shrunken effects from other contexts, and ridge regression on what describes a perturbation.

    - Measured elsewhere: the mean over the other contexts, what all perturbations share taken off, each gene shrunk
      by its own signal-to-noise ratio (which the agreement between contexts tells), and added to what perturbations
      share in the context asked for.
    - Measured nowhere: kernel ridge from the features (standardised; the penalty by exact leave-one-out error), on
      top of the shared effect; the own gene by the mean relative knock-down of the measured targets.
    """

    def __init__(self, effects: Effects) -> None:
        self._e = e = effects
        self._mean = PerturbationMean(e)
        shared = self._mean.common(e.pert_k, e.context_k)
        residual_kg = e.effect_kg - shared
        self.ratio_g = _signal_to_noise(residual_kg, e.pert_k, e.context_k, e.cells_k)
        centred = Effects(**{**e.__dict__, "effect_kg": residual_kg})
        self._residual = PerturbationMean(centred)
        self._kernel = _KernelRidge(e, residual_kg) if e.features_pf is not None else None
        self._knockdown = _mean_knockdown(e)
        self._known_p = e.known_p

    @property
    def penalty(self) -> float | None:
        """The ridge penalty that leave-one-out chose; None without features."""
        return self._kernel.penalty if self._kernel else None

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the shrunken effect where it is measured elsewhere, else the regression's."""
        shared = self._mean.common(pert_q, context_q)
        elsewhere, cells = self._residual.elsewhere(pert_q, context_q)
        out = shared + elsewhere * self._weight(cells)
        nowhere = np.flatnonzero(cells == 0)
        if len(nowhere):
            out[nowhere] = self.predict_unseen(pert_q[nowhere], context_q[nowhere])
        return out

    def predict_unseen(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the effects (q, g) as if the perturbations themselves had been measured nowhere."""
        out = self._mean.common(pert_q, context_q)
        if self._kernel is not None:
            out = out + self._kernel.predict(pert_q)
        self._set_knockdown(out, np.arange(len(out)), pert_q, context_q)
        return out

    def _weight(self, cells_q: np.ndarray) -> np.ndarray:
        """Return the shrinkage (q, g) of effects measured on so many cells."""
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
    """What perturbations share in the context, plus what is the perturbation's own elsewhere, not shrunken.

    The transformer's starting point: shrinking lowers the error of an effect but draws all of them together, which
    costs discrimination; how much to shrink is left to the network.
    """

    def _weight(self, cells_q: np.ndarray) -> np.ndarray:
        return np.ones((len(cells_q), 1))


def _signal_to_noise(
    effect_kg: np.ndarray, pert_k: np.ndarray, context_k: np.ndarray, cells_k: np.ndarray
) -> np.ndarray:
    """Return, per gene, the variance of true effects over the noise variance of one cell's worth of effect.

    Effects of one perturbation in two contexts share the truth and not the noise: their mean product is the
    variance of the truth. Each gene's ratio is pooled with that of all genes.
    """
    order = np.lexsort((context_k, pert_k))
    total = np.zeros((2, effect_kg.shape[1]))  # products, noise for one cell
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
        return np.full(effect_kg.shape[1], 1e12)  # nothing tells the noise: no shrinkage
    signal, noise = np.maximum(total / pairs, 0.0)
    overall = signal.sum() / max(noise.sum(), 1e-12)
    noise = np.maximum(noise, 1e-12 + 1e-3 * noise.mean())
    return (pairs * signal / noise + _POOLED_PERTURBATIONS * overall) / (pairs + _POOLED_PERTURBATIONS)


def _mean_knockdown(e: Effects) -> float | None:
    """Return the mean relative change of the own gene over the training runs (weighted by its expression)."""
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
                f"{len(train)} training perturbations have features: ridge needs at least 3",
                hint="check that the feature file's names are those of the perturbations",
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
        self._all_pg[train] = y - (y - fitted) / np.maximum(1.0 - hat, 1e-9)[:, None]  # leave one out

    def predict(self, pert_q: np.ndarray) -> np.ndarray:
        """Return the residual effects (q, g); a training perturbation's from all others."""
        return self._all_pg[pert_q]


def restore_spread(
    effect_qg: np.ndarray, prior_qg: np.ndarray, shared_qg: np.ndarray, limit: float = 3.0
) -> np.ndarray:
    """Return the effects with the size of what is the perturbation's own brought back to that of the prior.

    Whatever minimises an error predicts the mean of what an effect may be, which is smaller than any of them:
    predictions of weak effects come to lie near each other, and discrimination suffers. Here the part beyond the
    shared effect is stretched (never shrunk, at most ``limit``-fold) to the length it has in the prior.
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
