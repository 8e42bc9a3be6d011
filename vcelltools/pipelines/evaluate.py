"""The evaluation slice of a run: the model beside the baselines on the same held-out groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vcelltools.model.baselines import Effects
    from vcelltools.model.metrics import Slice
    from vcelltools.pipelines.effects import Screen

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]
_RESAMPLES = 1000


def evaluate(predict: Predict, screen: Screen, part: str) -> Slice:
    """Score predicted effects, ``predict(pert_k, line_k) -> (k, g)``, on the groups of ``part``."""
    from vcelltools.model.metrics import evaluate_effects

    rows = screen.rows(part)
    pert, line = screen.ids(rows)
    return evaluate_effects(predict(pert, line), screen.effect_kg[rows], line, screen.target_p[pert])


def evaluate_baselines(effects: Effects, screen: Screen, part: str) -> dict[str, dict[str, Any]]:
    """Return the scores of control mean, perturbation mean and ridge, with intervals."""
    from vcelltools.model.baselines import BASELINES, fit_baseline

    return {kind: describe(evaluate(fit_baseline(kind, effects).predict, screen, part)) for kind in BASELINES}


def describe(scores: Slice, seed: int = 0) -> dict[str, Any]:
    """Return the scores with 95 % intervals: a bootstrap over the groups, the same for every model."""
    out: dict[str, Any] = scores.to_json()
    if len(scores.pds_k) > 1:
        pick = np.random.default_rng(seed).integers(0, len(scores.pds_k), (_RESAMPLES, len(scores.pds_k)))
        for name, values in (("pds", scores.pds_k), ("pearson_delta", scores.pearson_k)):
            out[f"{name}_ci95"] = np.quantile(values[pick].mean(axis=1), [0.025, 0.975]).round(6).tolist()
    return out


def beats(model: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> bool:
    """Say whether the model is better than every baseline in both PDS and Pearson Δ."""
    return all(model[m] > b[m] for b in baselines.values() for m in ("pds", "pearson_delta"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the closing table."""

    model: str
    pds: float
    pearson_delta: float
    mae: float

    def cells(self) -> list[Any]:
        """Return the cells of the table."""
        return [self.model, self.pds, self.pearson_delta, self.mae]


def make_rows(model: str, final: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> list[Row]:
    """Return the closing table: baselines first, then what the network started from, the model last."""
    start = {f"{model}, untrained": final["untrained"]} if "untrained" in final else {}
    every = {**baselines, **start, model: final}
    return [Row(model=k, pds=v["pds"], pearson_delta=v["pearson_delta"], mae=v["mae"]) for k, v in every.items()]
