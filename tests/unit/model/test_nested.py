"""Models of effects whose parameters and mix are chosen on held-out training runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.model.test_baselines import C, G, P, make_effects
from vcelltools.errors import UsageError
from vcelltools.model.baselines import PerturbationMean, Pseudobulk
from vcelltools.model.kernel_ridge import KernelRidge
from vcelltools.model.metrics import evaluate_effects
from vcelltools.model.neighbours import Neighbours
from vcelltools.model.nested import Kind, classify, get_value, make_folds, score_mixes
from vcelltools.model.registry import MODELS, fit_model
from vcelltools.model.transfer import Transfer

ALL = ("ridge", "neighbours", "kernel-ridge", "transfer", "perturbation-mean")


def complete(effects, rng):
    """Return the same effects with a network between similar perturbations and with pseudobulks."""
    f = np.where(np.isfinite(effects.features_pf), effects.features_pf, 0)
    network = ((f @ f.T) > 3.0).astype(float)
    base = np.full((len(effects.pert_k), effects.effect_kg.shape[1]), 1.0)
    bulk = Pseudobulk(
        cp10k_kg=base * np.exp(np.clip(effects.effect_kg, -3, 3)), base_kg=base,
        control_cg=np.ones_like(effects.control_cg), share_cg=np.full_like(effects.control_cg, 0.5),
    )  # fmt: skip
    return replace(effects, network_pp=network, pseudobulk=bulk)


def test_neighbours_are_the_shrunk_mean_by_hand():
    from vcelltools.model.baselines import Effects

    effect = np.array([[1.0, 0.0], [3.0, 0.0], [-4.0, 6.0]])
    network = np.zeros((5, 5))
    network[4, 1] = network[4, 2] = 1.0
    e = Effects(
        effect_kg=effect, pert_k=np.array([1, 2, 3]), context_k=np.zeros(3, int), cells_k=np.full(3, 50),
        control_cg=np.ones((1, 2)), n_perturbations=5, network_pp=network,
    )  # fmt: skip
    shared, own = Neighbours(e, shrinkage=1.0).parts(np.array([4]), np.array([0]))
    np.testing.assert_allclose(shared[0], [0.0, 2.0])  # (Σ effects + λ mean) / (n + λ), as a mean and the rest
    np.testing.assert_allclose((shared + own)[0], (effect[0] + effect[1] + 1.0 * shared[0]) / 3.0)


def test_kernel_ridge_is_the_closed_form(rng):
    effects, _ = make_effects(rng, held={(p, c) for p in range(30, P) for c in range(C)})
    train = np.arange(30)
    x = effects.features_pf - effects.features_pf[train].mean(axis=0)
    x /= np.sqrt((x[train] ** 2).sum(axis=1).mean())
    mean = PerturbationMean(effects)
    residual = effects.effect_kg - mean.common_cg[effects.context_k]
    y = np.stack([np.average(residual[k := effects.pert_k == p], axis=0, weights=effects.cells_k[k]) for p in train])
    want = x @ np.linalg.solve(x[train].T @ x[train] + 0.3 * np.eye(x.shape[1]), x[train].T @ y)
    got = KernelRidge(effects, kernel="linear", penalty=0.3, nugget=0.0).parts(np.arange(30, P), np.zeros(P - 30, int))
    np.testing.assert_allclose(got[1], want[30:], atol=1e-9)


def test_transfer_carries_ratios_to_another_level(rng):
    effects, _ = make_effects(rng, held={(p, 0) for p in range(P)})
    effects = complete(effects, rng)
    k = len(effects.pert_k)
    fold = np.exp(rng.normal(size=(P, G)) * 0.5)
    bulk = replace(
        effects.pseudobulk, cp10k_kg=100.0 * fold[effects.pert_k], base_kg=np.full((k, G), 100.0),
        control_cg=np.full((C, G), 50.0), share_cg=np.full((C, G), 1.0),
    )  # fmt: skip
    effects = replace(effects, pseudobulk=bulk, control_cg=np.full((C, G), np.log1p(50.0)))
    pert, context = np.arange(P), np.zeros(P, int)
    shared, own = Transfer(effects, pseudocount=3.0).parts(pert, context)
    want = np.log1p(50.0 * fold) - np.log1p(50.0)
    np.testing.assert_allclose(shared + own, want, atol=0.02)


@pytest.mark.parametrize("kind", ALL)
def test_a_held_out_perturbation_is_predicted_better_than_by_nothing(kind, rng):
    held = {(p, c) for p in range(30, P) for c in range(C)} | {(p, 0) for p in range(5)}
    effects, truth = make_effects(rng, held=held)
    effects = complete(effects, rng)
    model = fit_model(kind, effects, "balanced")
    pert = np.r_[np.arange(30, P), np.arange(5)]
    context = np.zeros(len(pert), int)
    got = model.predict(pert, context)
    assert evaluate_effects(got, truth[pert, context], context).error < 1
    kinds = model.describe(pert, context)
    assert len(kinds) == 2 and all(c["n"] >= 3 for c in kinds.values())


@pytest.mark.parametrize("kind", ALL)
def test_a_training_run_is_answered_without_itself(kind, rng):
    effects = complete(make_effects(rng)[0], rng)
    model = fit_model(kind, effects, "error")
    first = (effects.pert_k[:1], effects.context_k[:1])
    which = model.choose(classify(effects, *first)[0])
    changed = effects.effect_kg.copy()
    changed[0] += 100.0
    moved = fit_model(kind, replace(effects, effect_kg=changed), "error")
    known, shared, own = moved._crossed(classify(effects, *first)[0], which.index)
    before = model._crossed(classify(effects, *first)[0], which.index)
    assert known[0]
    np.testing.assert_allclose(shared[0], before[1][0])
    np.testing.assert_allclose(own[0], before[2][0])


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_folds_ask_questions_of_their_kind(elsewhere, here, rng):
    effects, _ = make_effects(rng)
    kind, asked_k = Kind(elsewhere, here), np.zeros(len(effects.pert_k), int)
    for kept, asked in make_folds(effects, kind):
        assert not (kept & asked).any()
        inner = effects.select(kept)
        assert set(classify(inner, effects.pert_k[asked], effects.context_k[asked])) == {kind}
        asked_k += asked
    assert (asked_k == 1).all()


def test_scores_of_mixes_are_those_of_the_scorer(rng):
    n, g = 12, 20
    shared, own, measured = rng.normal(size=(3, n, g))
    context, target = np.repeat([0, 1], 6), rng.integers(-1, g, n)
    mixes = [(1.0, 0.5), (0.0, 0.0), (0.3, 2.0)]
    for (a, b), got in zip(mixes, score_mixes(shared, own, measured, context, target, mixes), strict=True):
        want = evaluate_effects(a * shared + b * own, measured, context, target)
        assert got.pds == pytest.approx(want.pds) and got.pearson_delta == pytest.approx(want.pearson_delta)
        assert got.error == pytest.approx(want.error) and got.relative_mae == pytest.approx(want.relative_mae)


def test_objectives_choose_what_they_name(rng):
    held = {(p, c) for p in range(30, P) for c in range(C)}
    effects = complete(make_effects(rng, noise=2.0, held=held)[0], rng)
    scores = {}
    for objective in ("discrimination", "error", "balanced"):
        model = fit_model("kernel-ridge", effects, objective)
        scores[objective] = model.choose(Kind(False, True)).scores
        for other, s in scores.items():
            del other
            assert get_value(scores[objective], objective) >= get_value(s, objective) - 1e-9
    assert scores["error"].relative_mae <= scores["discrimination"].relative_mae
    assert scores["discrimination"].pds >= scores["error"].pds


def test_nothing_to_choose_on_is_said(rng):
    effects = make_effects(rng, held={(p, c) for p in range(P) for c in (1, 2)})[0]
    model = fit_model("ridge", effects, "balanced")
    choice = model.choose(Kind(elsewhere=True, here=False))  # a single context cannot be left out
    assert (choice.n, choice.shared, choice.own) == (0, 1.0, 1.0)


def test_what_is_missing_is_said(rng):
    effects = make_effects(rng, features=False)[0]
    with pytest.raises(UsageError, match="network"):
        fit_model("neighbours", effects)
    with pytest.raises(UsageError, match="features"):
        fit_model("kernel-ridge", effects)
    with pytest.raises(UsageError, match="not known"):
        fit_model("zz", effects)
    with pytest.raises(UsageError, match="not known"):
        fit_model("ridge", effects, "zz")
    assert list(MODELS)[:2] == ["control-mean", "perturbation-mean"]
