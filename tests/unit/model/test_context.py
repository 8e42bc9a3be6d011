"""What the controls say of a context: its likeness to others, and whether it expresses the target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.model.test_baselines import P, make_effects
from tests.unit.model.test_nested import complete
from vcelltools.model.baselines import Effects, PerturbationMean
from vcelltools.model.context import Contextual, adjust, choose, get_factors, scale
from vcelltools.model.metrics import evaluate_effects
from vcelltools.model.registry import fit_model

C, G = 6, 80


def make_contexts(rng, *, silent=0.0, lineages=0, noise=0.2):
    """Return effects in six contexts: some do not express a target; those of a lineage share controls and effects."""
    target = rng.permutation(G)[:P]
    lineage = np.arange(C) % lineages if lineages else np.arange(C)
    control = (1.0 + rng.random((C, G)))[lineage] + 0.02 * rng.random((C, G))
    off = rng.random((C, P)) < silent
    for c in range(C):
        control[c, target[off[c]]] = 0.0
    specific = rng.normal(size=(P, G))
    own = rng.normal(size=(C, P, G))[lineage] * (1.0 if lineages else 0.2)
    truth = np.where(off.T[:, :, None], 0.0, (specific[None] + own).swapaxes(0, 1))
    for p in range(P):
        truth[p, :, target[p]] = -0.8 * control[:, target[p]]
    pert, context = np.repeat(np.arange(P), C), np.tile(np.arange(C), P)
    effect = truth[pert, context] + noise * rng.normal(size=(len(pert), G))
    effects = Effects(
        effect_kg=effect, pert_k=pert, context_k=context, cells_k=np.full(len(pert), 100), control_cg=control,
        n_perturbations=P, target_p=target,
    )  # fmt: skip
    return effects, truth


def test_full_effects_are_the_weighted_least_squares_by_hand(rng):
    effects, _ = make_contexts(rng, silent=0.3)
    half = 0.5
    full = PerturbationMean(adjust(effects, half, None))
    factor = get_factors(effects, half, effects.pert_k, effects.context_k)
    rows = np.flatnonzero((effects.pert_k == 3) & (effects.context_k != 0) & (factor >= 0.3))
    want = (factor[rows, None] * effects.effect_kg[rows]).sum(axis=0) / (factor[rows] ** 2).sum()
    got = full.predict(np.array([3]), np.array([0]))[0]
    others = np.arange(G) != effects.target_p[3]
    np.testing.assert_allclose(got[others], want[others])
    here = scale(effects, half, got[None], np.array([3]), np.array([0]))[0]
    np.testing.assert_allclose(here[others], want[others] * get_factors(effects, half, np.array([3]), np.array([0])))
    level = effects.control_cg[0, effects.target_p[3]]
    assert here[~others][0] == pytest.approx(-0.8 * level, abs=0.2 * level + 0.05)


def test_a_context_is_predicted_from_those_whose_controls_are_near(rng):
    effects, _ = make_contexts(rng, lineages=2)
    near = replace(effects, width=0.3).select(effects.context_k != 0).toward(0)
    weight = [near.nearness_k[near.context_k == c][0] for c in range(1, C)]
    assert np.argmax(weight) in (1, 3) and max(weight) == 1.0
    assert min(weight[1], weight[3]) > 0.9 and max(weight[0], weight[2], weight[4]) < 0.1


def test_only_what_helps_is_used(rng):
    assert choose(replace(make_contexts(rng)[0], target_p=None)) == (None, None)
    half, width = choose(make_contexts(rng, silent=0.3)[0])
    assert half is not None and width is None
    half, width = choose(make_contexts(rng, lineages=2)[0])
    assert width is not None
    effects, _ = make_contexts(rng, silent=0.3)
    assert choose(effects.select(effects.context_k == 0)) == (None, None)  # a single context cannot be left out


@pytest.mark.parametrize(
    ("kind", "differ"),
    [
        ("ridge", {"silent": 0.3}),
        ("perturbation-mean", {"silent": 0.3}),
        ("ridge", {"lineages": 2}),
        ("transfer", {"lineages": 2}),
    ],
)
def test_contexts_improve_the_prediction_of_a_new_one(kind, differ, rng):
    effects, truth = make_contexts(rng, **differ)
    train = effects.select(effects.context_k != 0)
    train = complete(replace(train, features_pf=rng.normal(size=(P, 4))), rng)
    pert, context = np.arange(P), np.zeros(P, int)
    model = fit_model(kind, train, "balanced")
    assert isinstance(model, Contextual)
    got = evaluate_effects(model.predict(pert, context), truth[:, 0], context, train.target_p)
    blind = replace(train, control_cg=np.tile(train.control_cg.mean(axis=0), (C, 1)), target_p=None)
    poor = evaluate_effects(fit_model(kind, blind, "balanced").predict(pert, context), truth[:, 0], context)
    assert got.error < 0.9 * poor.error and got.pds > poor.pds - 0.02
    (choice,) = model.describe(pert, context).values()
    assert choice["half" if "silent" in differ else "width"] is not None


def test_the_target_of_an_unmeasured_perturbation_is_knocked_down_by_its_level(rng):
    effects, truth = make_contexts(rng, silent=0.3)
    train = replace(effects.select(effects.pert_k != 5), features_pf=rng.normal(size=(P, 4)))
    model = fit_model("ridge", train, "error")
    assert isinstance(model, Contextual)
    pert, context = np.full(C, 5), np.arange(C)
    got = model.predict(pert, context)[:, effects.target_p[5]]
    np.testing.assert_allclose(got, truth[5, :, effects.target_p[5]], atol=0.1)


def test_runs_of_plain_effects_are_unchanged(rng):
    effects, _ = make_effects(rng)
    assert effects.toward(1) is effects and (effects.weight_k == effects.cells_k).all()


def test_discrimination_and_ratios_do_not_scale_by_the_target(rng):
    effects, _ = make_contexts(rng, silent=0.3)
    effects = complete(replace(effects, features_pf=rng.normal(size=(P, 4))), rng)
    for kind, objective, scales in (
        ("ridge", "discrimination", False), ("transfer", "error", False), ("ridge", "error", True),
    ):  # fmt: skip
        model = fit_model(kind, effects, objective)
        assert (getattr(model, "half", None) is not None) == scales
