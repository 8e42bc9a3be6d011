"""The network: its initial output, its inputs, and invalid ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcelltools.model.evidence import Evidence
from vcelltools.model.network import SIZES, check_ids, count_params, forward, init_params, make_config

pytestmark = pytest.mark.usefixtures("strict")
G, B, S = 50, 3, 12


def make(rng, **fields):
    config = make_config("tiny", genes=G, perturbations=7, **fields)
    params = init_params(config, jax.random.key(1))
    params = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(jax.random.key(w.size), w.shape), params)
    inputs = {
        "control_bsg": rng.gamma(1.0, 1.0, (B, S, G)).astype(np.float32),
        "evidence": make_evidence(rng),
        "pert_b": np.array([0, 6, 3], np.int32),
        "context_b": np.array([1, 0, 0], np.int32),
    }
    if config.features:
        inputs["features_bf"] = rng.normal(size=(B, config.features)).astype(np.float32)
    return config, params, jax.tree.map(jnp.asarray, inputs)


def make_evidence(rng) -> Evidence:
    prior, shared = (rng.normal(0, 0.2, (B, G)).astype(np.float32) for _ in range(2))
    positive = [rng.gamma(1.0, 1.0, (B, G)).astype(np.float32) for _ in range(3)]
    own_gene = np.eye(G, dtype=np.float32)[rng.permutation(G)[:B]]
    return Evidence(prior, shared, 0.1 * positive[0], positive[1], own_gene, positive[2])


@pytest.mark.parametrize("fields", [{}, {"contexts": 2, "features": 5, "depth": 2}, {"identity": False, "features": 5}])
def test_permuting_the_cells_permutes_the_output(rng, fields):
    config, params, inputs = make(rng, **fields)
    order = rng.permutation(S)
    straight = forward(params, config, **inputs)
    inputs["control_bsg"] = inputs["control_bsg"][:, order]
    assert float(jnp.abs(forward(params, config, **inputs) - straight[:, order]).max()) <= 1e-5
    assert float(jnp.abs(straight - straight[:, order]).max()) > 0.1


def test_an_untrained_network_is_control_plus_prior(rng):
    config, _, inputs = make(rng)
    params = init_params(config, jax.random.key(0))
    want = inputs["control_bsg"] + jnp.broadcast_to(inputs["evidence"].prior[:, None, :], (B, S, G))
    np.testing.assert_allclose(forward(params, config, **inputs), want, atol=1e-6)


def test_scan_is_the_unrolled_network(rng):
    config, params, inputs = make(rng)
    np.testing.assert_allclose(
        forward(params, config, **inputs, scan=True), forward(params, config, **inputs), atol=2e-5
    )


def test_bfloat16_comes_near_float32_and_returns_float32(rng):
    config, params, inputs = make(rng)
    low = forward(params, config, **inputs, dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert float(jnp.abs(low - forward(params, config, **inputs)).mean()) < 0.05


@pytest.mark.parametrize("name", [*Evidence._fields, "pert_b", "context_b", "features_bf"])
def test_every_input_matters(rng, name):
    config, params, inputs = make(rng, contexts=2, features=5)
    before = forward(params, config, **inputs)
    if name in Evidence._fields:
        changed = jnp.flip(getattr(inputs["evidence"], name), axis=0)
        inputs["evidence"] = inputs["evidence"]._replace(**{name: changed})
    else:
        inputs[name] = jnp.flip(inputs[name], axis=0)
    assert float(jnp.abs(forward(params, config, **inputs) - before).max()) > 1e-3


def test_cells_of_a_set_see_each_other_and_sets_do_not(rng):
    config, params, inputs = make(rng)
    before = forward(params, config, **inputs)
    inputs["control_bsg"] = inputs["control_bsg"].at[0, 0].add(3.0)
    moved = jnp.abs(forward(params, config, **inputs) - before).max(axis=-1)
    assert float(moved[0, 1:].min()) > 1e-4
    assert float(moved[1:].max()) == 0.0


def test_nonnegative_output(rng):
    config, params, inputs = make(rng, nonnegative=True)
    inputs["evidence"] = inputs["evidence"]._replace(prior=inputs["evidence"].prior - 5.0)
    assert float(forward(params, config, **inputs).min()) == 0.0


def test_ids_out_of_range_are_refused():
    check_ids("perturbation", np.array([0, 4]), 5)
    with pytest.raises(IndexError, match=r"perturbation id 5 lies outside \[0, 5\)"):
        check_ids("perturbation", np.array([0, 5]), 5)
    with pytest.raises(IndexError, match="context id -1"):
        check_ids("context", np.array([-1]), 5)


@pytest.mark.parametrize(
    ("size", "low", "high"), [("rn", 1.8e6, 2.3e6), ("base", 70e6, 120e6), ("large", 150e6, 190e6)]
)
def test_sizes(size, low, high):
    config = make_config(size, genes=2000, perturbations=2000)
    assert set(SIZES) == {"tiny", "rn", "base", "large"}
    assert low < count_params(jax.eval_shape(lambda: init_params(config, jax.random.key(0)))) < high
