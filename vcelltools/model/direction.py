"""Predict an effect from effects that were measured in the same direction (CRISPRi, CRISPRa, ...).

A request is answered from a *view* of the training runs: those of its direction and those whose direction is unknown
as they are. A perturbation that has no such run is borrowed from another direction if a fitted, signed weight is
shown to help: its perturbation-specific effect times the weight is added to the effect that the perturbations share in
the requested direction. The weight is the slope of a regression through the origin, over the perturbations that were
measured in both directions, of their specific effects in one direction on those in the other. It is used if its
predictions of left-out perturbations have a smaller squared error than no specific effect.

Every model of effects is fitted to a view as if there were no directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from vcelltools.model.baselines import EffectModel, Effects, average_runs, get_mean_knockdown, mean_by_context

LEAST_PAIRS = 3
_PSEUDOCOUNT = 0.1  # CP10K, for the ratios of pseudobulks


class Views:
    """The training runs as they are seen from each direction."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.get = cache(self._make)

    def split(self, pert_q: np.ndarray, context_q: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the positions of the requests of each direction, and the direction."""
        direction_q = self.effects.get_directions(pert_q, context_q)
        for d in np.unique(direction_q):
            yield np.flatnonzero(direction_q == d), int(d)

    @property
    def largest(self) -> Effects:
        """The view of the direction with the most training runs."""
        e = self.effects
        known = np.zeros(0, np.int64) if e.direction_k is None else e.direction_k[e.direction_k >= 0]
        return (self.get(int(np.bincount(known).argmax())) if len(known) else None) or e

    def _make(self, direction: int) -> Effects | None:
        """Return the training runs seen from a direction, or None if nothing was measured in it."""
        e = self.effects
        if e.direction_k is None or direction < 0:
            return e
        same = (e.direction_k == direction) | (e.direction_k < 0)
        if same.all():
            return e
        if not same.any():
            return None
        own = e.select(same)
        parts = [own]
        taken = own.known_p
        for other in np.unique(e.direction_k[~same]):
            theirs = e.select(e.direction_k == other)
            weight = fit_weight(own, theirs)
            lent = theirs.select(~taken[theirs.pert_k])
            if weight is not None and len(lent.pert_k):
                parts.append(_convert(lent, theirs, own, weight))
                taken = taken | lent.known_p
        return _join(parts, direction)


def fit_weight(own: Effects, theirs: Effects) -> float | None:
    """Return the weight of specific effects of another direction, or None if it does not help or cannot be fitted."""
    a_pg, a_cells = average_runs(theirs, _center(theirs, theirs.effect_kg))
    b_pg, b_cells = average_runs(own, _center(own, own.effect_kg))
    both = np.flatnonzero((a_cells > 0) & (b_cells > 0))
    if len(both) < LEAST_PAIRS:
        return None
    a, b = a_pg[both], b_pg[both]
    if own.target_p is not None:  # a method may act on its target with any strength
        at = np.flatnonzero(own.target_p[both] >= 0)
        a[at, own.target_p[both][at]] = b[at, own.target_p[both][at]] = 0.0
    cross, square = (a * b).sum(axis=1), (a * a).sum(axis=1)
    if not square.sum() > 0:
        return None
    others = (cross.sum() - cross) / np.maximum(square.sum() - square, 1e-12)
    error = ((b - others[:, None] * a) ** 2).sum()
    return float(cross.sum() / square.sum()) if error < (b * b).sum() else None


def _center(e: Effects, values_kg: np.ndarray) -> np.ndarray:
    return values_kg - mean_by_context(e, values_kg)[e.context_k]


def _convert(lent: Effects, theirs: Effects, own: Effects, weight: float) -> Effects:
    """Return runs of another direction as runs of the own one, in copies of their contexts."""
    shared, inverse = mean_by_context(own, own.effect_kg), mean_by_context(theirs, theirs.effect_kg)
    rows, context = np.arange(len(lent.pert_k)), lent.context_k
    effect = shared[context] + weight * (lent.effect_kg - inverse[context])
    target = np.full(len(rows), -1) if lent.target_p is None else lent.target_p[lent.pert_k]
    inside = target >= 0
    knockdown = get_mean_knockdown(own)
    if knockdown is not None:
        own_gene = lent.control_cg[context[inside], target[inside]]
        effect[rows[inside], target[inside]] = knockdown * own_gene
    bulk = lent.pseudobulk
    if bulk is not None:
        ratio, of_own, of_theirs = (_get_ratio(e) for e in (lent, own, theirs))
        ratio = mean_by_context(own, of_own)[context] + weight * (ratio - mean_by_context(theirs, of_theirs)[context])
        if own.target_p is not None:
            at = own.target_p[own.pert_k]
            if (at >= 0).any():
                ratio[rows[inside], target[inside]] = of_own[at >= 0, at[at >= 0]].mean()
        cp10k = np.maximum((bulk.base_kg + _PSEUDOCOUNT) * np.exp(ratio) - _PSEUDOCOUNT, 0.0)
        bulk = replace(bulk, cp10k_kg=cp10k)
    borrowed = np.ones(len(rows), bool)
    context = context + len(own.control_cg)
    return replace(lent, effect_kg=effect, context_k=context, pseudobulk=bulk, borrowed_k=borrowed)


def _get_ratio(e: Effects) -> np.ndarray:
    assert e.pseudobulk is not None
    return np.log((e.pseudobulk.cp10k_kg + _PSEUDOCOUNT) / (e.pseudobulk.base_kg + _PSEUDOCOUNT))


def _join(parts: list[Effects], direction: int) -> Effects:
    """Return the runs of all parts; borrowed ones lie in copies of the contexts, which are added."""
    first = parts[0]
    if len(parts) == 1:
        return replace(first, direction_k=None)

    def stack(name: str) -> np.ndarray:
        return np.concatenate([getattr(p, name) for p in parts])

    bulk = first.pseudobulk
    if bulk is not None:
        kept = {k: np.concatenate([getattr(p.pseudobulk, k) for p in parts]) for k in ("cp10k_kg", "base_kg")}
        bulk = replace(
            bulk, **kept, control_cg=np.tile(bulk.control_cg, (2, 1)), share_cg=np.tile(bulk.share_cg, (2, 1))
        )
    borrowed = [np.zeros(len(p.pert_k), bool) if p.borrowed_k is None else p.borrowed_k for p in parts]
    return replace(
        first,
        effect_kg=stack("effect_kg"),
        pert_k=stack("pert_k"),
        context_k=stack("context_k"),
        cells_k=stack("cells_k"),
        control_cg=np.tile(first.control_cg, (2, 1)),
        borrowed_k=np.concatenate(borrowed),
        direction_k=None,
        pseudobulk=bulk,
    )


class Directed:
    """A model of effects that answers every request from the view of its direction.

    A direction in which nothing was measured is answered by no effect.
    """

    def __init__(self, fit: Callable[[Effects], EffectModel], effects: Effects) -> None:
        self._views, self._genes = Views(effects), effects.effect_kg.shape[1]
        self._fit = fit
        self._get = cache(self._fit_for)

    def _fit_for(self, direction: int) -> Any:
        view = self._views.get(direction)
        return None if view is None else self._fit(view)

    def _answer(self, ask: Callable[[Any, np.ndarray, np.ndarray], np.ndarray], pert_q: Any, context_q: Any) -> Any:
        out = np.zeros((len(pert_q), self._genes))
        for rows, direction in self._views.split(pert_q, context_q):
            if (model := self._get(direction)) is not None:
                out[rows] = ask(model, pert_q[rows], context_q[rows])
        return out

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g)."""
        return self._answer(lambda model, p, c: model.predict(p, c), pert_q, context_q)

    def predict_for(self, objective: str, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g) of a nested model under an objective."""
        return self._answer(lambda model, p, c: model.predict_for(objective, p, c), pert_q, context_q)

    def describe(self, pert_q: np.ndarray, context_q: np.ndarray) -> dict[str, Any]:
        """Return the choices of a nested model behind some predictions, by the description of their kind."""
        found = [(self._get(d), rows) for rows, d in self._views.split(pert_q, context_q)]
        many = len(found) > 1
        return {
            f"{kind}, direction {i + 1}" if many else kind: choice
            for i, (model, rows) in enumerate(found)
            if model is not None
            for kind, choice in model.describe(pert_q[rows], context_q[rows]).items()
        }
