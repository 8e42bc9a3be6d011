"""Combinations of perturbations from their parts, with a fitted interaction."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from vcelltools.model.baselines import Effects
from vcelltools.model.combination import Combined, Interaction
from vcelltools.model.registry import fit_model

N, G = 12, 120
PAIRS = list(itertools.combinations(range(1, N + 1), 2))[::3]


def make_pairs(rng, *, how="sum", noise=0.05, held=5):
    """Return the effects of single perturbations and of some pairs in one context, and all true effects (p, g)."""
    single = rng.normal(size=(N + 1, G)) * np.linspace(0.3, 1.5, N + 1)[:, None]
    truth = [*single]
    for a, b in PAIRS:
        x, y = sorted((single[a], single[b]), key=lambda v: -np.linalg.norm(v))
        both = np.where(x * y > 0, np.sign(x) * np.minimum(np.abs(x), np.abs(y)), 0.0)
        truth.append({"sum": x + y, "linear": 0.9 * x + 0.3 * y, "overlap": x + y - both}[how])
    truth = np.array(truth)
    pert = np.arange(1, len(truth) - held)
    effects = Effects(
        effect_kg=truth[pert] + noise * rng.normal(size=(len(pert), G)), pert_k=pert,
        context_k=np.zeros(len(pert), int), cells_k=np.full(len(pert), 100), control_cg=np.ones((1, G)),
        n_perturbations=len(truth), parts_p={N + 1 + i: pair for i, pair in enumerate(PAIRS)},
    )  # fmt: skip
    return effects, truth


@pytest.mark.parametrize("how", ["sum", "linear", "overlap"])
def test_the_form_of_the_interaction_is_found(how, rng):
    effects, truth = make_pairs(rng, how=how, held=5)
    found = Interaction(effects)
    assert found.form == how and found.n == len(PAIRS) - 5
    want = {"sum": [0, 0, 0], "linear": [-0.1, -0.7, 0], "overlap": [0, 0, -1]}[how]
    np.testing.assert_allclose(found.solve(found.form), want, atol=0.15)
    asked = np.arange(len(truth) - 5, len(truth))
    got = fit_model("ridge", effects).predict(asked, np.zeros(5, int))
    assert ((got - truth[asked]) ** 2).sum() < 0.05 * (truth[asked] ** 2).sum()
    plain = fit_model("ridge", replace(effects, parts_p=None)).predict(asked, np.zeros(5, int))
    assert ((got - truth[asked]) ** 2).sum() < 0.2 * ((plain - truth[asked]) ** 2).sum()


def test_a_combination_is_predicted_without_itself(rng):
    effects, _ = make_pairs(rng, how="linear")
    p = np.array([N + 3])
    before = fit_model("ridge", effects).predict(p, np.array([0]))
    changed = effects.effect_kg.copy()
    changed[effects.pert_k == p[0]] += 50.0
    after = fit_model("ridge", replace(effects, effect_kg=changed))
    assert isinstance(after, Combined)
    if after._interaction.form == "linear":
        np.testing.assert_allclose(after.predict(p, np.array([0])), before)


def test_few_pairs_keep_the_sum(rng):
    some, _ = make_pairs(rng, how="linear")
    assert Interaction(some.select(some.pert_k < N + 4)).form == "sum"


def test_parts_that_were_not_measured_here_are_predicted(rng):
    effects, _ = make_pairs(rng)
    two = replace(effects, control_cg=np.ones((2, G)))
    p, part = N + 1, PAIRS[0]
    gone = two.select(~np.isin(two.pert_k, [p]))
    model = fit_model("perturbation-mean", gone)
    got = model.predict(np.array([p, *part]), np.array([1, 1, 1]))
    np.testing.assert_allclose(got[0], got[1] + got[2])


def test_targets_are_added_and_three_parts_too(rng):
    effects, truth = make_pairs(rng, how="linear")
    target = np.full(len(truth), -1)
    target[1 : N + 1] = np.arange(N)
    known = replace(effects, target_p=target)
    p, (a, b) = N + 1, PAIRS[0]
    got = fit_model("ridge", known).predict(np.array([p]), np.array([0]))[0]
    run = {int(q): k for k, q in enumerate(effects.pert_k)}
    total = effects.effect_kg[run[a]] + effects.effect_kg[run[b]]
    np.testing.assert_allclose(got[[target[a], target[b]]], total[[target[a], target[b]]])
    three = replace(effects, n_perturbations=len(truth) + 1, parts_p={**effects.parts_p, len(truth): (1, 2, 3)})
    got = fit_model("ridge", three).predict(np.array([len(truth)]), np.array([0]))[0]
    np.testing.assert_allclose(got, sum(effects.effect_kg[run[q]] for q in (1, 2, 3)))
