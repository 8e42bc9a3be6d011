"""Effects of one direction are not averaged with those of another one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.model.test_baselines import C, P, make_effects
from tests.unit.model.test_nested import complete
from vcelltools.model.direction import Directed, Views, fit_weight
from vcelltools.model.metrics import evaluate_effects
from vcelltools.model.registry import MODELS, fit_model

RAISED = 2  # the context whose perturbations go the other way
WEIGHT = -0.7


def make_directed(rng, held=(), weight=WEIGHT):
    """Return effects whose specific parts are reversed in the last context, and the true effects (p, c, g)."""
    effects, truth = make_effects(rng, noise=0.3, held=held)
    shared = truth.mean(axis=0)  # of every context
    truth[:, RAISED] = shared[RAISED] + (truth[:, RAISED] - shared[RAISED]) / weight
    reverse = effects.context_k == RAISED
    noise = effects.effect_kg - make_effects_truth(effects, truth, shared, weight)
    effect = effects.effect_kg.copy()
    effect[reverse] = truth[effects.pert_k[reverse], RAISED] + noise[reverse]
    direction = (effects.context_k == RAISED).astype(np.int64)
    table = np.tile((np.arange(C) == RAISED).astype(np.int64), (P, 1))
    return replace(effects, effect_kg=effect, direction_k=direction, direction_pc=table), truth


def make_effects_truth(effects, truth, shared, weight):
    """Return the true effects of the runs before any was reversed."""
    out = truth[effects.pert_k, effects.context_k].copy()
    rows = effects.context_k == RAISED
    out[rows] = shared[RAISED] + (out[rows] - shared[RAISED]) * weight
    return out


def test_the_weight_is_the_slope_through_the_origin(rng):
    effects, _ = make_directed(rng)
    own, theirs = (effects.select(effects.direction_k == d) for d in (0, 1))
    assert fit_weight(own, theirs) == pytest.approx(WEIGHT, abs=0.05)
    assert fit_weight(theirs, own) == pytest.approx(1 / WEIGHT, abs=0.1)
    scrambled = replace(theirs, effect_kg=rng.normal(size=theirs.effect_kg.shape))
    assert fit_weight(own, scrambled) is None  # what predicts no left-out perturbation is not used
    assert fit_weight(own, theirs.select(theirs.pert_k < 2)) is None  # two pairs are too few


def test_a_view_takes_its_own_direction_first(rng):
    held = {(p, c) for p in range(5) for c in (0, 1)}
    effects, truth = make_directed(rng, held=held)
    view = Views(effects).get(0)
    assert set(view.pert_k[view.borrowed_k]) == set(range(5))  # measured in the other direction alone
    assert (view.context_k[view.borrowed_k] == C + RAISED).all() and len(view.control_cg) == 2 * C
    kept = ~view.borrowed_k
    np.testing.assert_array_equal(view.effect_kg[kept], effects.effect_kg[effects.direction_k == 0])
    got = Directed(MODELS["perturbation-mean"], effects).predict(np.arange(5), np.zeros(5, int))
    wanted = truth[:5, 0]
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("kind", [k for k in MODELS if k != "control-mean"])
def test_knowing_the_direction_helps_every_model(kind, rng):
    effects, truth = make_directed(rng, held={(p, 0) for p in range(P)})
    effects = complete(effects, rng)
    blind = replace(effects, direction_k=None, direction_pc=None)
    pert, context = np.arange(P), np.zeros(P, int)
    got, poor = (
        evaluate_effects(fit_model(kind, e).predict(pert, context), truth[pert, 0], context) for e in (effects, blind)
    )
    assert got.pearson_delta > poor.pearson_delta + 0.1
    assert got.pds >= poor.pds and got.error < poor.error


@pytest.mark.parametrize("kind", MODELS)
def test_one_direction_and_unknown_ones_change_nothing(kind, rng):
    effects = complete(make_effects(rng, held={(p, 0) for p in range(P)})[0], rng)
    pert, context = np.arange(P), np.zeros(P, int)
    plain = fit_model(kind, effects).predict(pert, context)
    for known in (0, -1):
        same = np.full(len(effects.pert_k), known)
        one = replace(effects, direction_k=same, direction_pc=np.zeros((P, C), int))
        np.testing.assert_array_equal(fit_model(kind, one).predict(pert, context), plain)


def test_a_direction_in_which_nothing_was_measured_has_no_effect(rng):
    effects, _ = make_directed(rng)
    asked = replace(effects, direction_pc=np.full((P, C), 2))
    assert not fit_model("ridge", asked).predict(np.arange(3), np.zeros(3, int)).any()
    assert Views(asked).get(2) is None


def test_a_nested_model_describes_its_choices_for_each_direction(rng):
    effects, _ = make_directed(rng)
    model = fit_model("ridge", effects, "balanced")
    found = model.describe(np.array([0, 0]), np.array([0, RAISED]))
    assert len(found) == 2
    answers = model.predict_for("error", np.array([0, 0]), np.array([0, RAISED]))
    assert np.isfinite(answers).all() and (answers[0] != answers[1]).any()
