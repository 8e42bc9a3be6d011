"""Every optimiser changes the parameters as optax's own function does on plain arrays."""

from __future__ import annotations

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from vcelltools.model.network import init_params, make_config
from vcelltools.model.optimizers import OPTIMIZERS
from vcelltools.model.step import StepConfig, make_optimizer
from vcelltools.training.settings import TrainSettings, make_settings

RATE, DECAY = 0.01, 0.5
MODEL = make_config("tiny", genes=7, perturbations=3, hidden=8, ff=8)


def update(name: str, **fields):
    """Return (parameters, gradients of three steps, updates of the last step) of a small network."""
    config = StepConfig(steps=5, learning_rate=RATE, warmup=0, schedule="constant", weight_decay=DECAY, clip=0.0,
                        optimizer=name, **fields)  # fmt: skip
    params = init_params(MODEL, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    grads = [tree.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]) for _ in range(3)]
    return params, grads, run(make_optimizer(config), params, grads)


def run(optimizer, params, grads):
    state = optimizer.init(params)
    for g in grads:
        out, state = optimizer.update(g, state, params)
    return out


def get(tree, *path):
    for key in path:
        tree = tree[key]
    return tree


MATRIX, BIAS, NORM = ("cell", 0, "w"), ("cell", 0, "b"), ("layers", "norm_attn")


def test_every_optimiser_can_be_chosen():
    assert set(get_args(get_type_hints(TrainSettings)["optimizer"])) == set(OPTIMIZERS)
    with pytest.raises(ValueError, match="optimizer 'lion' is not one of adamw, adam, sgd, muon"):
        StepConfig(optimizer="lion")


@pytest.mark.parametrize(
    ("name", "path", "reference"),
    [
        ("adamw", MATRIX, optax.adamw(RATE, b2=0.99, weight_decay=DECAY)),
        ("adamw", BIAS, optax.adamw(RATE, b2=0.99, weight_decay=0.0)),
        ("adam", MATRIX, optax.adam(RATE, b2=0.99)),
        ("sgd", MATRIX, optax.sgd(RATE, momentum=0.9)),
        ("sgd", NORM, optax.sgd(RATE, momentum=0.9)),
        ("muon", MATRIX, optax.nadamw(RATE, b2=0.99, weight_decay=0.0)),
        ("muon", NORM, optax.nadamw(RATE, b2=0.99, weight_decay=0.0)),
    ],
)
def test_a_step_is_that_of_optax(name, path, reference):
    params, grads, found = update(name)
    want = run(reference, get(params, *path), [get(g, *path) for g in grads])
    np.testing.assert_allclose(get(found, *path), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("key", ["qkv", "down"])
def test_muon_takes_each_layer_as_a_matrix_of_its_own(key):
    params, grads, found = update("muon")
    for i in range(MODEL.layers):
        reference = muon(RATE, weight_decay=DECAY, consistent_rms=0.2)
        want = run(reference, params["layers"][key][i], [g["layers"][key][i] for g in grads])
        np.testing.assert_allclose(found["layers"][key][i], want, rtol=2e-3, atol=1e-6)
        whole = found["layers"][key][i] + RATE * DECAY * params["layers"][key][i]
        singular = np.linalg.svd(np.asarray(whole) / (RATE * 0.2 * np.sqrt(max(whole.shape))), compute_uv=False)
        assert singular.min() > 0.3 and singular.max() < 1.4, "nearly orthogonal"


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_judge_is_ten_times_faster_and_does_not_decay(name):
    params, grads, found = update(name)
    reference = {"sgd": optax.sgd(RATE, momentum=0.9), "muon": optax.nadam(RATE, b2=0.99)}
    want = run(reference.get(name, optax.adam(RATE, b2=0.99)), params["judge"]["w"], [g["judge"]["w"] for g in grads])
    np.testing.assert_allclose(found["judge"]["w"], 10 * want, rtol=1e-5, atol=1e-8)


def test_the_learning_rate_scales_with_the_batch():
    def get_rate(sets, **fields):
        return make_settings({}, {"learning_rate": 0.001, "sets": sets, **fields}).peak_rate

    assert get_rate(64) == 0.001 and get_rate(64, scale_rate=False) == 0.001
    assert [get_rate(n, scale_rate=True) for n in (64, 128, 512, 1024)] == pytest.approx([0.0005, 0.001, 0.004, 0.004])


def test_settings_record_what_the_optimiser_reads():
    for name in OPTIMIZERS:
        said = make_settings({}, {"optimizer": name}).to_json()
        assert said["optimizer"] == name and ("weight_decay" in said) == (name in ("adamw", "muon"))
