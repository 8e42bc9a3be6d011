"""The effect of a combination of perturbations, from the effects of its parts.

By default the effects of the parts are added. If the training runs have combinations whose parts were measured in the
same context, an interaction of two parts is fitted, as in the genetic interaction model of Norman et al. (2019,
doi:10.1126/science.aax4438): ``c1 · strong + c2 · weak``, where the stronger part has the larger effect, and in the
form ``overlap`` also ``c3 · overlap``. The overlap is what both parts do to a gene in the same direction (the smaller
of the two effects), so a negative ``c3`` means that effects saturate. The coefficients are one set for all genes,
shrunken toward the sum. The form is chosen by leaving one combination out at a time: the sum is kept unless another
form is better by two standard errors and by 5 % of the error. Targeted genes are always added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vcelltools.model.baselines import Effects

FORMS = {"sum": 0, "linear": 2, "overlap": 3}
"""The number of coefficients of each form."""
_LEAST = 5  # combinations
_LEAST_GAIN = 0.05  # of the squared error of a simpler form: noise in the parts alone makes coefficients a bit smaller

Ask = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Interaction:
    """A fitted interaction of two perturbations."""

    def __init__(self, effects: Effects) -> None:
        self._e = effects
        run = _list_runs(effects)
        grams, rights, keys, errors = [], [], [], []
        for k, (p, c) in enumerate(zip(effects.pert_k.tolist(), effects.context_k.tolist(), strict=True)):
            parts = _get_parts(effects, p)
            direction = -1 if effects.direction_k is None else int(effects.direction_k[k])
            singles = [_find(effects, run, part, c, direction) for part in parts]
            if len(parts) != 2 or min(singles, default=-1) < 0:
                continue
            x, total = _make_terms(effects, parts, *(effects.effect_kg[i] for i in singles))
            counts = self._count_genes(parts)
            rest = (effects.effect_kg[k] - total) * counts
            grams.append(x @ (x * counts).T)
            rights.append(x @ rest)
            errors.append(rest @ rest)
            keys.append(p)
        self._keys = np.array(keys, np.int64)
        self._gram, self._right = np.array(grams).reshape(-1, 3, 3), np.array(rights).reshape(-1, 3)
        self.form = self._choose(np.array(errors))

    @property
    def n(self) -> int:
        """Number of combinations behind the fit."""
        return len(np.unique(self._keys))

    def _count_genes(self, parts: tuple[int, ...]) -> np.ndarray:
        counts = np.ones(self._e.effect_kg.shape[1])
        counts[_get_targets(self._e, parts)] = 0.0
        return counts

    def _choose(self, error_k: np.ndarray) -> str:
        """Return the form with the smallest error on left-out combinations, if it is surely better than the sum."""
        if self.n < _LEAST:
            return "sum"
        best, gained = "sum", 0.0
        for form in ("linear", "overlap"):
            d = np.array([self.solve(form, without=p) for p in self._keys.tolist()])
            change = np.einsum("ki,kij,kj->k", d, self._gram, d) - 2 * np.einsum("ki,ki->k", d, self._right)
            gain = np.array([-change[self._keys == p].mean() for p in np.unique(self._keys)])
            needed = gained + _LEAST_GAIN * (error_k.mean() - gained)
            if gain.mean() > max(needed, 2 * gain.std(ddof=1) / np.sqrt(len(gain))):
                best, gained = form, float(gain.mean())
        return best

    def solve(self, form: str, without: int = -1) -> np.ndarray:
        """Return what the coefficients (3,) add to the sum, fitted without a combination."""
        n, kept = FORMS[form], self._keys != without
        out = np.zeros(3)
        if n and kept.any():
            gram, right = self._gram[kept].sum(axis=0)[:n, :n], self._right[kept].sum(axis=0)[:n]
            shrink = np.diag(gram) / max(len(np.unique(self._keys[kept])), 1)  # as strong as one combination
            out[:n] = np.linalg.solve(gram + np.diag(shrink + 1e-12), right)
        return out

    def apply(self, p: int, parts: tuple[int, ...], part_effects: list[np.ndarray]) -> np.ndarray:
        """Return the effect (g,) of combination ``p``, whose own runs are not used."""
        if len(parts) != 2 or self.form == "sum":
            return np.sum(part_effects, axis=0)
        x, total = _make_terms(self._e, parts, *part_effects)
        return total + self.solve(self.form, without=p) @ (x * self._count_genes(parts))


def _make_terms(
    effects: Effects, parts: tuple[int, ...], a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the terms (3, g) of the interaction and the sum (g,)."""
    own = _get_targets(effects, parts)
    size = [np.delete(v, own) @ np.delete(v, own) for v in (a, b)]
    strong, weak = (a, b) if size[0] >= size[1] else (b, a)
    overlap = np.where(a * b > 0, np.sign(a) * np.minimum(np.abs(a), np.abs(b)), 0.0)
    return np.stack([strong, weak, overlap]), a + b


def _get_targets(effects: Effects, parts: tuple[int, ...]) -> np.ndarray:
    target = np.full(len(parts), -1) if effects.target_p is None else effects.target_p[list(parts)]
    return target[target >= 0]


def _get_parts(effects: Effects, p: int) -> tuple[int, ...]:
    return effects.parts_p.get(p, ()) if effects.parts_p else ()


def _list_runs(effects: Effects) -> dict[tuple[int, int], list[int]]:
    out: dict[tuple[int, int], list[int]] = {}
    for k, key in enumerate(zip(effects.pert_k.tolist(), effects.context_k.tolist(), strict=True)):
        out.setdefault(key, []).append(k)
    return out


def _fits(effects: Effects, k: int, direction: int) -> bool:
    return effects.direction_k is None or direction < 0 or effects.direction_k[k] in (direction, -1)


def _find(effects: Effects, runs: dict[tuple[int, int], list[int]], p: int, c: int, direction: int) -> int:
    """Return the training run of a perturbation in a context and direction, or -1."""
    return next((k for k in runs.get((p, c), []) if _fits(effects, k, direction)), -1)


def need_parts(effects: Effects, p: int, c: int, direction: int) -> bool:
    """Return whether a combination is predicted from its parts: it has no training run in another context."""
    if not _get_parts(effects, p):
        return False
    rows = np.flatnonzero((effects.pert_k == p) & (effects.context_k != c))
    return not any(_fits(effects, k, direction) for k in rows.tolist())


def combine(
    effects: Effects, interaction: Interaction, ask: Ask, pert_q: np.ndarray, context_q: np.ndarray
) -> np.ndarray:
    """Return the effects (q, g) of requests: of combinations from their parts, and of the others by ``ask``.

    A part that was measured in the context is used as measured; other parts are predicted.
    """
    direction_q = effects.get_directions(pert_q, context_q)
    requests = list(zip(pert_q.tolist(), context_q.tolist(), direction_q.tolist(), strict=True))
    runs = _list_runs(effects)
    joined = {i: _get_parts(effects, p) for i, (p, c, d) in enumerate(requests) if need_parts(effects, p, c, d)}
    measured = {
        (i, part): _find(effects, runs, part, requests[i][1], requests[i][2])
        for i, parts in joined.items()
        for part in parts
    }
    asked = [(i, -1) for i in range(len(requests)) if i not in joined] + [key for key, k in measured.items() if k < 0]
    pert = np.array([pert_q[i] if part < 0 else part for i, part in asked], np.int64)
    context = np.array([context_q[i] for i, _ in asked], np.int64)
    answers = dict(zip(asked, ask(pert, context) if asked else [], strict=True))
    out = np.zeros((len(requests), effects.effect_kg.shape[1]))
    for i in range(len(requests)):
        if i not in joined:
            out[i] = answers[i, -1]
            continue
        each = [answers[i, m] if (k := measured[i, m]) < 0 else effects.effect_kg[k] for m in joined[i]]
        out[i] = interaction.apply(int(pert_q[i]), joined[i], each)
    return out


class Combined:
    """A model of effects that predicts unmeasured combinations from their parts."""

    def __init__(self, model: Any, effects: Effects) -> None:
        self._model, self._e, self._interaction = model, effects, Interaction(effects)

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g)."""
        return combine(self._e, self._interaction, self._model.predict, pert_q, context_q)

    def predict_for(self, objective: str, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g) of a nested model under an objective."""
        return combine(
            self._e, self._interaction, lambda p, c: self._model.predict_for(objective, p, c), pert_q, context_q
        )

    def describe(self, pert_q: np.ndarray, context_q: np.ndarray) -> dict[str, Any]:
        """Return the choices of a nested model behind some predictions."""
        return self._model.describe(pert_q, context_q)
