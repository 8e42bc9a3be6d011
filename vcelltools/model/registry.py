"""The models of effects. To add one, write a file with a class and add a line to ``MODELS``.

A class without ``GRID`` is fitted and used as it is (the baselines that every table shows). For a class with ``GRID``,
:class:`vcelltools.model.nested.Nested` chooses the parameters and the mix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vcelltools.errors import UsageError
from vcelltools.model.baselines import BASELINES, EffectModel, Effects, PerturbationMean
from vcelltools.model.combination import Combined
from vcelltools.model.context import HALVES, Contextual, choose
from vcelltools.model.direction import Directed
from vcelltools.model.kernel_ridge import KernelRidge
from vcelltools.model.neighbours import Neighbours
from vcelltools.model.nested import Nested
from vcelltools.model.transfer import Transfer

MODELS: dict[str, Callable[..., Any]] = {
    **BASELINES,
    "neighbours": Neighbours,
    "kernel-ridge": KernelRidge,
    "transfer": Transfer,
}


def is_nested(kind: str, objective: str | None) -> bool:
    """Return whether parameters and mix are chosen: always with a grid, otherwise only if an objective is given."""
    return hasattr(MODELS[kind], "GRID") or (objective is not None and kind != "control-mean")


def needs_pseudobulk(kind: str) -> bool:
    """Return whether a model needs mean CP10K values."""
    return bool(getattr(MODELS.get(kind), "NEEDS_PSEUDOBULK", False))


def fit_model(kind: str, effects: Effects, objective: str | None = None) -> EffectModel:
    """Return a fitted model of effects.

    It answers each request from runs of its direction if directions are known, and combinations from their parts.

    Raises
    ------
    UsageError
        If the model does not exist, or lacks the features or the network that it needs.
    """
    if kind not in MODELS:
        raise UsageError(f"model {kind!r} is not known", hint=f"one of: {', '.join(MODELS)}", field="model")
    made, fit = MODELS[kind], MODELS[kind]
    if is_nested(kind, objective):
        if not hasattr(made, "GRID"):
            made = _give_parts(made)
        made(effects, **made.GRID[0])  # raises an error for missing inputs before any fold is fitted
        fit = partial(_fit_nested, made, objective or "balanced")
    model = fit(effects) if effects.direction_k is None else Directed(fit, effects)
    return Combined(model, effects) if effects.parts_p and kind != "control-mean" else model


def _fit_nested(made: Any, objective: str, effects: Effects) -> Nested | Contextual:
    """Return a nested model, on effects adjusted to their contexts if this helps."""
    plain = objective == "discrimination" or getattr(made, "NEEDS_PSEUDOBULK", False)
    half, width = choose(effects, halves=(None,) if plain else HALVES)
    fit = partial(Nested, made, objective=objective)
    return fit(effects) if half is None and width is None else Contextual(fit, effects, half, width)


def _give_parts(made: Callable[[Effects], EffectModel]) -> Any:
    """Return a baseline as a model of two parts: the shared effect, and the rest of its prediction."""

    class WithParts:
        GRID: tuple[dict[str, Any], ...] = ({},)

        def __init__(self, effects: Effects) -> None:
            self._model, self._mean = made(effects), PerturbationMean(effects)

        def parts(self, pert_q: Any, context_q: Any) -> tuple[Any, Any]:
            shared = self._mean.common(pert_q, context_q)
            return shared, self._model.predict(pert_q, context_q) - shared

    return WithParts
