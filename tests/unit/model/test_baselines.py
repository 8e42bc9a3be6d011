"""Baselines and scores on effects whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.errors import UsageError
from vcelltools.model.baselines import (
    Additive,
    ControlMean,
    Effects,
    PerturbationMean,
    Ridge,
    fit_prior,
    restore_spread,
)
from vcelltools.model.metrics import Slice, evaluate_effects
from vcelltools.model.registry import fit_model
from vcelltools.training.evaluate import choose_share

P, C, G, F = 40, 3, 60, 6


def make_effects(rng, noise=0.5, held=(), features=True):
    """Return effects of P perturbations in C contexts: linear in features, with a shared shift and noise by cells."""
    features_pf = rng.normal(size=(P, F))
    truth_pg = features_pf @ rng.normal(size=(F, G)) / np.sqrt(F)
    shift_cg = 0.5 * rng.normal(size=(C, G))
    runs = [(p, c) for p in range(P) for c in range(C) if (p, c) not in held]
    pert, context = np.array(runs).T
    cells = rng.integers(20, 200, len(runs))
    effect = truth_pg[pert] + shift_cg[context] + noise * rng.normal(size=(len(runs), G)) * np.sqrt(50 / cells)[:, None]
    effects = Effects(
        effect_kg=effect, pert_k=pert, context_k=context, cells_k=cells, control_cg=np.ones((C, G)),
        n_perturbations=P, features_pf=features_pf if features else None,
    )  # fmt: skip
    return effects, truth_pg[:, None] + shift_cg[None]


def test_a_run_never_predicts_itself(rng):
    effects, _ = make_effects(rng)
    for cls in (PerturbationMean, Ridge, Additive):
        before = cls(effects).predict(effects.pert_k[:1], effects.context_k[:1])
        changed = effects.effect_kg.copy()
        changed[0] += 100.0
        moved = Effects(**{**effects.__dict__, "effect_kg": changed})
        after = cls(moved).predict(effects.pert_k[:1], effects.context_k[:1])
        if cls is PerturbationMean:
            np.testing.assert_allclose(after, before, atol=1e-9)
        else:  # the noise estimate uses all runs, but the prediction must not change
            assert np.abs(after - before).max() < 10.0


def test_perturbation_mean_is_the_mean_elsewhere_weighed_by_cells(rng):
    effects, _ = make_effects(rng)
    got = PerturbationMean(effects).predict(np.array([5]), np.array([1]))[0]
    others = np.flatnonzero((effects.pert_k == 5) & (effects.context_k != 1))
    want = np.average(effects.effect_kg[others], axis=0, weights=effects.cells_k[others])
    np.testing.assert_allclose(got, want)


def test_unseen_perturbations_get_the_mean_of_all_in_the_context(rng):
    effects, _ = make_effects(rng, held={(7, c) for c in range(C)})
    got = PerturbationMean(effects).predict(np.array([7]), np.array([2]))[0]
    np.testing.assert_allclose(got, effects.effect_kg[effects.context_k == 2].mean(axis=0))


def test_ridge_shrinks_noise_and_knows_the_context(rng):
    held = {(p, 0) for p in range(10, P)}
    effects, truth = make_effects(rng, noise=2.0, held=held, features=False)
    pert, context = np.arange(10, P), np.zeros(P - 10, int)
    error = {
        kind: np.mean((fit_model(kind, effects).predict(pert, context) - truth[pert, 0]) ** 2)
        for kind in ("control-mean", "perturbation-mean", "ridge")
    }
    assert error["ridge"] < 0.8 * min(error["perturbation-mean"], error["control-mean"])


def test_ridge_predicts_unseen_perturbations_from_features(rng):
    held = {(p, c) for p in range(30, P) for c in range(C)}
    effects, truth = make_effects(rng, held=held)
    pert, context = np.arange(30, P), np.zeros(P - 30, int)
    by_features = Ridge(effects).predict(pert, context)
    by_mean = PerturbationMean(effects).predict(pert, context)
    good = evaluate_effects(by_features, truth[pert, 0], context)
    poor = evaluate_effects(by_mean, truth[pert, 0], context)
    assert good.pearson_delta > poor.pearson_delta + 0.2
    assert good.pds > 0.9 > poor.pds


def test_leave_one_out_of_the_kernel_ridge_is_a_refit(rng):
    effects, _ = make_effects(rng, noise=0.1)
    model = Ridge(effects)._kernel
    keep = effects.pert_k != 3
    effect = Effects(
        **{
            **effects.__dict__,
            **{k: getattr(effects, k)[keep] for k in ("effect_kg", "pert_k", "context_k", "cells_k")},
        }
    )
    refit = Ridge(effect)._kernel
    assert np.corrcoef(model.predict(np.array([3]))[0], refit.predict(np.array([3]))[0])[0, 1] > 0.98


def test_own_gene_of_an_unseen_perturbation_is_knocked_down(rng):
    effects, _ = make_effects(rng, held={(0, c) for c in range(C)})
    target = np.arange(P)
    changed = effects.effect_kg.copy()
    changed[np.arange(len(changed)), target[effects.pert_k]] = -0.7
    known = Effects(**{**effects.__dict__, "effect_kg": changed, "target_p": target})
    assert Ridge(known).predict(np.array([0]), np.array([1]))[0, 0] == pytest.approx(-0.7)


def test_one_context_alone_works(rng):
    effects, _ = make_effects(rng, held={(p, c) for p in range(P) for c in (1, 2)})
    for kind in ("control-mean", "perturbation-mean", "ridge"):
        assert np.isfinite(fit_model(kind, effects).predict(np.array([0, 1]), np.array([0, 0]))).all()


def test_names():
    with pytest.raises(UsageError, match="not known"):
        fit_model("median", None)
    with pytest.raises(UsageError, match="not known"):
        fit_prior("median", None)
    effects, _ = make_effects(np.random.default_rng(0))
    assert not fit_prior("none", effects).predict(np.array([1]), np.array([1])).any()
    assert isinstance(fit_prior("none", effects), ControlMean)


def test_restoring_the_spread_lengthens_what_is_the_perturbations_own(rng):
    shared = rng.normal(size=(4, G))
    prior = shared + rng.normal(size=(4, G))
    weak = shared + 0.5 * (prior - shared)
    np.testing.assert_allclose(restore_spread(weak, prior, shared), prior)
    strong = shared + 2 * (prior - shared)
    np.testing.assert_allclose(restore_spread(strong, prior, shared), strong)
    assert np.isfinite(restore_spread(shared, prior, shared)).all()


def test_scores_of_perfect_constant_and_reversed_predictions(rng):
    truth = rng.normal(size=(20, G))
    context = np.repeat([0, 1], 10)
    perfect = evaluate_effects(truth, truth, context)
    assert (perfect.pds, perfect.mae) == (1.0, 0.0)
    assert perfect.pearson_delta == pytest.approx(1.0)
    nothing = evaluate_effects(np.zeros_like(truth), truth, context)
    assert nothing.pds == pytest.approx(0.5)
    assert nothing.pearson_delta == 0.0
    assert evaluate_effects(-truth, truth, context).pds < 0.2


def test_further_runs_of_the_context_are_rivals(rng):
    measured, context = np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2, int)
    predicted = np.array([[0.8, 0.0], [0.0, 0.2]])
    rivals, where = np.array([[0.7, 0.0], [0.0, 0.3], [0.0, 0.2]]), np.array([0, 0, 1])
    s = evaluate_effects(predicted, measured, context, rival_rg=rivals, rival_context_r=where)
    np.testing.assert_allclose(s.pds_k, [2 / 3, 2 / 3])  # of three others, one rival each is nearer
    alone = evaluate_effects(predicted, measured, context)
    assert alone.pds_k.tolist() == [1.0, 1.0]


def test_own_gene_is_left_out_of_the_distance():
    truth = np.zeros((2, 3))
    truth[0, 0] = truth[1, 1] = -5.0
    predicted = truth.copy()
    own = np.array([0, 1])
    assert evaluate_effects(predicted, truth, np.zeros(2), None).pds == 1.0
    # without the targeted gene, the remaining zeros are nearer to the truth than the other's knock-down
    assert evaluate_effects(np.zeros((2, 3)), truth, np.zeros(2), own).pds == 1.0


def test_a_share_is_taken_where_it_is_surely_better(rng):
    def make(pds_k):
        return Slice(float(np.mean(pds_k)), 0.0, 0.0, np.asarray(pds_k), np.zeros(len(pds_k)))

    base = rng.uniform(0.4, 0.6, 40)
    lucky = base + rng.normal(0.005, 0.2, 40)
    better, best = base + rng.normal(0.05, 0.05, 40), base + rng.normal(0.15, 0.05, 40)
    assert choose_share([make(v) for v in (base, lucky, better)]) == 2
    assert choose_share([make(v) for v in (base, best, better)]) == 1
    assert choose_share([make(v) for v in (base, lucky, base - 0.1)]) == 0
    assert choose_share([make(base[:1]), make(best[:1])]) == 0
