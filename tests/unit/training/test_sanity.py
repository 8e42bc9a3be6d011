"""Every sanity mode holds, and a deliberately broken model fails it."""

from __future__ import annotations

import pytest

from vcelltools.errors import UsageError
from vcelltools.training.evaluate import evaluate
from vcelltools.training.inputs import make_setup
from vcelltools.training.sanity import check_sanity

FIT = {"learning_rate": 5e-3, "weight_decay": 0.0, "steps": 60}


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("overfit-batch", {**FIT, "sets": 2, "accumulate": 1}),
        ("controls-same", {"steps": 30}),
        ("controls-resampled", {"steps": 30}),
        ("random-perturbations", {"steps": 20}),
        ("permutation", {"steps": 10}),
    ],
)
def test_holds(settings, store, one_device, mode, fields):
    found = check_sanity(mode, settings(**fields), stores=[store])
    assert found.holds, found


def test_a_network_that_learns_nothing_does_not_overfit(settings, store, one_device):
    found = check_sanity("overfit-batch", settings(learning_rate=0.0, steps=25, sets=2), stores=[store])
    assert not found.holds


def test_a_positional_network_fails_the_permutation(settings, store, one_device, monkeypatch):
    import jax.numpy as jnp

    from vcelltools.model import step

    forward = step.forward

    def positional(params, config, control_bsg, *args, **kw):
        place = jnp.arange(control_bsg.shape[1], dtype=jnp.float32)[None, :, None]
        return forward(params, config, control_bsg, *args, **kw) + 0.01 * place

    monkeypatch.setattr(step, "forward", positional)
    assert not check_sanity("permutation", settings(steps=2), stores=[store]).holds


def test_shuffled_labels_discriminate_nothing_where_true_ones_do(settings, store, one_device, tmp_path):
    split = tmp_path / "split.toml"
    split.write_text('[training]\nsim = "train"\n[zeroshot]\n"sim.line1" = "test"\n')
    chosen = settings(split=str(split), steps=20)
    found = check_sanity("random-perturbations", chosen, stores=[store])
    assert found.holds, found
    assert found.figures["standard_error"] < 0.09  # twelve groups
    setup = make_setup(chosen, [store])
    true = evaluate(lambda *ids: setup.judge(*ids)["prior_kg"], setup.screen, "test").pds
    assert true > 0.8
    assert found.figures["pds"] < true - 0.15


def test_random_genes_are_worse_than_variable_ones(settings, store, one_device):
    found = check_sanity("random-genes", settings(steps=20), stores=[store])
    assert found.holds, found
    assert found.figures["genes"] == 15
    assert found.figures["pds_first"] > found.figures["pds_random"]


def test_unknown_mode(settings, store):
    with pytest.raises(UsageError, match="not known"):
        check_sanity("overfitting", settings(), stores=[store])
