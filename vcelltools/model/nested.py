"""Choose the parameters of a model of effects by nested cross-validation.

A request (a perturbation in a context) is of one of four kinds: the perturbation was measured in another context or
not, and other perturbations were measured in the context or not. Training runs are held out so that they are of the
same kind: a perturbation in all its contexts, a whole context, or single runs. A model that was fitted to the other
runs predicts the held-out runs. The scores of these predictions determine the model's parameters and then the mix:
``a`` times the shared effect plus ``b`` times the perturbation-specific effect. Discrimination and error favour
different mixes, so an objective decides. The requested groups are never used in this choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from vcelltools.errors import UsageError
from vcelltools.model.baselines import Effects, PerturbationMean, get_mean_knockdown
from vcelltools.model.metrics import Slice, correlate_rows

OBJECTIVES = ("discrimination", "error", "balanced")
SHARED = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
OWN = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.2, 1.4, 1.55, 1.7, 2.0)
_MOST_ERROR = 0.95  # squared error over that of no effect, with a margin because the requested groups differ
_FOLDS = 10  # of many perturbations; few perturbations are left out one at a time
_FEW = 30
_SCORED = 120  # runs per context that score a choice
_LEAST = 3  # held-out runs that a choice needs


class Kind(NamedTuple):
    """The kind of a request: what was measured of the perturbation and of the context."""

    elsewhere: bool
    here: bool

    def describe(self) -> str:
        """Return the kind in words."""
        perturbation = "perturbations measured elsewhere" if self.elsewhere else "perturbations measured nowhere"
        return f"{perturbation}, {'some others' if self.here else 'nothing'} measured in the context"


class PartsModel(Protocol):
    """A model whose predictions have two parts, which are scaled separately."""

    def parts(self, pert_q: np.ndarray, context_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shared and the perturbation-specific effects, both (q, g) float64."""


class ModelClass(Protocol):
    """The class of a registered model; ``GRID`` lists the parameters to choose from."""

    GRID: tuple[Mapping[str, Any], ...]

    def __call__(self, effects: Effects, **parameters: Any) -> PartsModel:
        """Fit the model to effects."""


class Mixed(NamedTuple):
    """The scores of a mix, as in :class:`vcelltools.model.metrics.Slice`."""

    pds: float
    pearson_delta: float
    relative_mae: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What nested cross-validation chose for one kind of request.

    Attributes
    ----------
    index, parameters
        Position in the grid of the model, and the parameters there.
    shared, own
        Scales of the two parts.
    n
        Number of held-out runs behind the choice. 0 if the training runs have none of this kind; the first parameters
        of the grid are then used, unscaled.
    scores
        Scores of the held-out runs; None without any.
    """

    index: int
    parameters: Mapping[str, Any]
    shared: float
    own: float
    n: int
    scores: Mixed | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        out: dict[str, Any] = {**self.parameters, "shared": self.shared, "own": self.own, "n": self.n}
        return out | ({} if self.scores is None else {"nested": self.scores._asdict()})


def check_objective(objective: str) -> None:
    """Raise a :class:`UsageError` for an objective that does not exist."""
    if objective not in OBJECTIVES:
        raise UsageError(
            f"objective {objective!r} is not known", hint=f"one of: {', '.join(OBJECTIVES)}", field="objective"
        )


def get_value(scores: Slice | Mixed, objective: str) -> float:
    """Return the value of scores under an objective; larger is better.

    ``discrimination``: PDS. ``error``: minus the mean absolute error over that of no effect. ``balanced``: the best
    discrimination (2 PDS − 1 plus Pearson Δ) among the mixes whose squared error stays below 0.95 of that of no effect;
    any excess counts tenfold. Among mixes that discriminate equally, the one with the smaller error wins.
    """
    if objective == "discrimination":
        return scores.pds + 1e-3 * scores.pearson_delta
    if objective == "error":
        return -scores.relative_mae
    excess = max(scores.error - _MOST_ERROR, 0.0)
    return 2 * scores.pds - 1 + scores.pearson_delta - 0.1 * (scores.relative_mae + scores.error) - 10 * excess


def classify(effects: Effects, pert_q: np.ndarray, context_q: np.ndarray) -> list[Kind]:
    """Return the kind of each request; a training run is treated as if it had not been measured."""
    runs = set(zip(effects.pert_k.tolist(), effects.context_k.tolist(), strict=True))
    by_pert = np.bincount(effects.pert_k, minlength=effects.n_perturbations)
    by_context = np.bincount(effects.context_k, minlength=len(effects.control_cg))
    out = []
    for p, c in zip(pert_q.tolist(), context_q.tolist(), strict=True):
        itself = (p, c) in runs
        out.append(Kind(bool(by_pert[p] > itself), bool(by_context[c] > itself)))
    return out


def make_folds(effects: Effects, kind: Kind) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (kept, asked): masks (k,) of the runs that a model is fitted to and of those that it predicts."""
    pert, context = effects.pert_k, effects.context_k
    perts, contexts = np.unique(pert), np.unique(context)
    rank = np.zeros(effects.n_perturbations, np.int64)
    rank[np.random.default_rng(0).permutation(perts)] = np.arange(len(perts))
    n = len(perts) if len(perts) <= _FEW else _FOLDS
    fold_k = rank[pert] % n
    if kind == Kind(elsewhere=False, here=True):
        for f in range(n):
            yield fold_k != f, fold_k == f
    elif kind == Kind(elsewhere=True, here=False):
        for c in contexts:
            yield context != c, context == c
    elif kind.elsewhere:  # single runs: a perturbation in one context at a time
        n = max(min(n, _FOLDS), len(contexts))
        place = np.searchsorted(contexts, context)
        for f in range(n):
            asked = (rank[pert] + place) % n == f
            yield ~asked, asked
    else:
        n = min(n, 5)
        for c, f in itertools.product(contexts, range(n)):
            away = (context == c) | (rank[pert] % n == f)
            yield ~away, (context == c) & (rank[pert] % n == f)


class Nested:
    """A registered model whose parameters and mix are chosen separately for every kind of request.

    A training run is predicted by the fold that held it out.
    """

    def __init__(self, model: ModelClass, effects: Effects, objective: str = "balanced") -> None:
        check_objective(objective)
        self._model, self._effects, self.objective = model, effects, objective
        self._choose, self._fit = cache(self._choose_for), cache(self._fit_for)
        self._crossed = cache(self._cross)
        self._knockdown = get_mean_knockdown(effects)

    def predict(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g)."""
        return self.predict_for(self.objective, pert_q, context_q)

    def predict_for(self, objective: str, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the predicted effects (q, g) under an objective."""
        e = self._effects
        out = np.zeros((len(pert_q), e.effect_kg.shape[1]))
        run = {key: k for k, key in enumerate(zip(e.pert_k.tolist(), e.context_k.tolist(), strict=True))}
        kinds = np.array([(k.elsewhere, k.here) for k in classify(e, pert_q, context_q)], bool).reshape(-1, 2)
        for kind in map(Kind._make, sorted({tuple(k) for k in kinds.tolist()})):
            rows = np.flatnonzero((kinds == kind).all(axis=1))
            choice = self.choose(kind, objective)
            own_runs = [run.get((int(pert_q[i]), int(context_q[i])), -1) for i in rows]
            new = rows[np.array(own_runs) < 0]
            for context, some in self._split(kind, new, context_q):
                shared, own = self._fit(choice.index, context).parts(pert_q[some], context_q[some])
                out[some] = choice.shared * shared + choice.own * own
            if len(new) < len(rows):
                known, shared_kg, own_kg = self._crossed(kind, choice.index)
                for i, k in zip(rows, own_runs, strict=True):
                    if k >= 0 and known[k]:
                        out[i] = choice.shared * shared_kg[k] + choice.own * own_kg[k]
                    elif k >= 0:
                        out[i] = PerturbationMean(e).predict(pert_q[i : i + 1], context_q[i : i + 1])[0]
            if not kind.elsewhere:
                self._set_knockdown(out, rows, pert_q, context_q)
        return out

    def choose(self, kind: Kind, objective: str | None = None) -> Choice:
        """Return the choice for a kind of request."""
        return self._choose(kind, objective or self.objective)

    def describe(self, pert_q: np.ndarray, context_q: np.ndarray) -> dict[str, Any]:
        """Return the choices behind some predictions, by the description of their kind."""
        kinds = sorted(set(classify(self._effects, pert_q, context_q)))
        return {k.describe(): self.choose(k).to_json() for k in kinds}

    def _split(self, kind: Kind, rows: np.ndarray, context_q: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield some requests, and the context that the training runs are weighed toward, -1 for none."""
        if kind.here or self._effects.width is None:
            if len(rows):
                yield -1, rows
            return
        for context in np.unique(context_q[rows]).tolist():
            yield context, rows[context_q[rows] == context]

    def _fit_for(self, index: int, context: int = -1) -> PartsModel:
        effects = self._effects if context < 0 else self._effects.toward(context)
        return self._model(effects, **self._model.GRID[index])

    def _cross(self, kind: Kind, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a mask (k,) of the predicted runs, and both parts (k, g) of their predictions."""
        e = self._effects
        known = np.zeros(len(e.pert_k), bool)
        shared, own = np.zeros((2, *e.effect_kg.shape))
        for kept, asked in make_folds(e, kind):
            inner = e.select(kept)
            if not kind.here and asked.any():
                inner = inner.toward(int(e.context_k[asked][0]))
            if not len(inner.pert_k) or not asked.any():
                continue
            rows = np.flatnonzero(asked)
            same = np.array([k == kind for k in classify(inner, e.pert_k[rows], e.context_k[rows])])
            rows = rows[same]
            if len(rows) and _can_fit(self._model, inner):
                model = self._model(inner, **self._model.GRID[index])
                shared[rows], own[rows] = model.parts(e.pert_k[rows], e.context_k[rows])
                known[rows] = True
        return known, shared, own

    def _choose_for(self, kind: Kind, objective: str) -> Choice:
        """Return the parameters and the mix whose predictions of held-out runs have the best objective."""
        e, grid = self._effects, self._model.GRID
        best = Choice(index=0, parameters=grid[0], shared=1.0, own=1.0, n=0, scores=None)
        value = -np.inf
        for index in self._list_parameters(kind):
            known, shared, own = self._crossed(kind, index)
            known = known if e.borrowed_k is None else known & ~e.borrowed_k
            rows = _thin(np.flatnonzero(known), e.context_k)
            if len(rows) < _LEAST:
                break
            target = np.full(len(rows), -1) if e.target_p is None else e.target_p[e.pert_k[rows]]
            mixes = list(itertools.product(SHARED, OWN))
            scored = score_mixes(shared[rows], own[rows], e.effect_kg[rows], e.context_k[rows], target, mixes)
            values = [get_value(s, objective) for s in scored]
            i = int(np.argmax(values))
            if values[i] > value + 1e-9:
                value, (a, b) = values[i], mixes[i]
                best = Choice(index=index, parameters=grid[index], shared=a, own=b, n=len(rows), scores=scored[i])
        return best

    def _list_parameters(self, kind: Kind) -> list[int]:
        """Return the grid positions that differ for a kind; some parameters only concern other contexts."""
        idle = () if kind.elsewhere else getattr(self._model, "OF_MEASURED", ())
        first: dict[tuple, int] = {}
        for i, parameters in enumerate(self._model.GRID):
            first.setdefault(tuple((k, v) for k, v in parameters.items() if k not in idle), i)
        return list(first.values())

    def _set_knockdown(self, out: np.ndarray, rows: np.ndarray, pert_q: np.ndarray, context_q: np.ndarray) -> None:
        """Set the targeted gene of perturbations that were measured nowhere to the mean relative knock-down."""
        e = self._effects
        if e.target_p is None or self._knockdown is None:
            return
        target = e.target_p[pert_q[rows]]
        inside = target >= 0
        out[rows[inside], target[inside]] = self._knockdown * e.control_cg[context_q[rows[inside]], target[inside]]


def score_mixes(
    shared_kg: np.ndarray,
    own_kg: np.ndarray,
    measured_kg: np.ndarray,
    context_k: np.ndarray,
    target_k: np.ndarray,
    mixes: list[tuple[float, float]],
) -> list[Mixed]:
    """Return the scores of every mix ``a * shared + b * own``: as in ``evaluate_effects``, for many mixes at once."""
    from scipy.spatial.distance import cdist

    n, own_gene = len(measured_kg), target_k >= 0
    pds_mk = np.full((len(mixes), n), 0.5)
    mae, square, pearson_mk = np.zeros(len(mixes)), np.zeros(len(mixes)), np.zeros((len(mixes), n))
    members = [rows for c in np.unique(context_k) if len(rows := np.flatnonzero(context_k == c)) > 1]
    for m, (a, b) in enumerate(mixes):
        mix = a * shared_kg + b * own_kg
        difference = mix - measured_kg
        mae[m], square[m] = np.abs(difference).mean(), (difference**2).sum()
        pearson_mk[m] = correlate_rows(mix, measured_kg)
        for rows in members:
            distance = cdist(mix[rows], measured_kg[rows], "cityblock")
            at, t = np.flatnonzero(own_gene[rows]), target_k[rows][own_gene[rows]]
            distance[at] -= np.abs(mix[rows[at], t][:, None] - measured_kg[np.ix_(rows, t)].T)
            itself = np.diag(distance)[:, None]
            closer = (distance < itself).sum(axis=1) + 0.5 * ((distance == itself).sum(axis=1) - 1)
            pds_mk[m, rows] = 1.0 - closer / (len(rows) - 1)
    nothing = max(float(np.abs(measured_kg).mean()), 1e-12), max(float((measured_kg**2).sum()), 1e-12)
    return [
        Mixed(float(pds_mk[m].mean()), float(pearson_mk[m].mean()), float(mae[m] / nothing[0]),
              float(square[m] / nothing[1]))
        for m in range(len(mixes))
    ]  # fmt: skip


def _can_fit(model: ModelClass, effects: Effects) -> bool:
    """Return whether the remaining runs suffice to fit a model; a model may define its own method for this."""
    check = getattr(model, "can_fit", None)
    return len(effects.pert_k) > 0 and (check is None or bool(check(effects)))


def _thin(rows: np.ndarray, context_k: np.ndarray) -> np.ndarray:
    """Return at most ``_SCORED`` rows per context, drawn with a fixed seed."""
    rng, out = np.random.default_rng(1), []
    for c in np.unique(context_k[rows]):
        some = rows[context_k[rows] == c]
        out.append(np.sort(rng.permutation(some)[:_SCORED]))
    return np.concatenate(out) if out else rows
