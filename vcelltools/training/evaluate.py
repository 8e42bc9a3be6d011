"""Evaluate a run: score the model and the baselines on the same held-out groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vcelltools.model.baselines import Effects
    from vcelltools.model.metrics import Slice
    from vcelltools.sampling.effects import Screen

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]
_RESAMPLES = 1000


def evaluate(predict: Predict, screen: Screen, part: str, *, rivals: tuple[str, ...] = ()) -> Slice:
    """Score predicted effects, ``predict(pert_k, line_k) -> (k, g)``, on the groups of ``part``.

    Discrimination compares these groups and those of the parts ``rivals``.
    """
    from vcelltools.model.metrics import evaluate_effects

    rows = screen.rows(part)
    pert, line = screen.ids(rows)
    others = np.concatenate([np.zeros(0, np.int64), *[screen.rows(r) for r in rivals]]).astype(np.int64)
    return evaluate_effects(
        predict(pert, line),
        screen.effect_kg[rows],
        line,
        screen.target_p[pert],
        rival_rg=screen.effect_kg[others],
        rival_context_r=screen.ids(others)[1],
    )


def choose_share(scores: list[Slice]) -> int:
    """Choose one of several predictions of the same groups: the first, unless another is significantly better.

    Better means a gain in PDS plus Pearson Δ, paired over groups, of more than two standard errors. Otherwise chance
    would decide if there are few groups.
    """
    first = scores[0].pds_k + scores[0].pearson_k
    best, gained = 0, 0.0
    for i, s in enumerate(scores):
        gain = s.pds_k + s.pearson_k - first
        if len(gain) < 2 or gain.mean() <= gained:
            continue
        if gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)):
            best, gained = i, float(gain.mean())
    return best


def evaluate_baselines(effects: Effects, screen: Screen, part: str) -> dict[str, dict[str, Any]]:
    """Return the scores of control-mean, perturbation-mean and ridge, with intervals."""
    from vcelltools.model.baselines import BASELINES
    from vcelltools.model.registry import fit_model

    return {kind: describe(evaluate(fit_model(kind, effects).predict, screen, part)) for kind in BASELINES}


def describe(scores: Slice, seed: int = 0) -> dict[str, Any]:
    """Return the scores with 95 % bootstrap intervals; every model gets the same samples of groups."""
    out: dict[str, Any] = scores.to_json()
    if len(scores.pds_k) > 1:
        pick = np.random.default_rng(seed).integers(0, len(scores.pds_k), (_RESAMPLES, len(scores.pds_k)))
        for name, values in (("pds", scores.pds_k), ("pearson_delta", scores.pearson_k)):
            out[f"{name}_ci95"] = np.quantile(values[pick].mean(axis=1), [0.025, 0.975]).round(6).tolist()
    return out


def beats(model: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> bool:
    """Return whether the model is better than every baseline in both PDS and Pearson Δ."""
    return all(model[m] > b[m] for b in baselines.values() for m in ("pds", "pearson_delta"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the final table; ``error`` is the squared error over that of no effect."""

    model: str
    pds: float
    pearson_delta: float
    mae: float
    error: float

    def cells(self) -> list[Any]:
        """Return the cells of the row."""
        return [self.model, self.pds, self.pearson_delta, self.mae, self.error]


def make_rows(summary: dict[str, Any]) -> list[Row]:
    """Return the final table: the baselines, the untrained network, and the model under each objective."""
    final, model = summary["final"], summary["final"]["model"]
    every = dict(summary["baselines"])
    if "untrained" in final:
        every[f"{model}, untrained"] = final["untrained"]
    if "objectives" in summary:
        every |= {f"{model}, {name}": scores for name, scores in summary["objectives"].items()}
    else:
        every[model] = final
    return [Row(model=k, **{m: v[m] for m in ("pds", "pearson_delta", "mae", "error")}) for k, v in every.items()]
