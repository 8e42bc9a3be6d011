"""The losses compared with their definitions, computed pair by pair in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcelltools.model.loss_registry import set_loss
from vcelltools.model.losses import energy_distance, mean_squared_error
from vcelltools.model.sinkhorn import sinkhorn_divergence

pytestmark = pytest.mark.usefixtures("strict")


def pairs(x, y):
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def naive_energy(x, y, unbiased):
    x, y = x.astype(np.float64), y.astype(np.float64)
    s, t = len(x), len(y)
    by_s, by_t = (s * (s - 1), t * (t - 1)) if unbiased else (s * s, t * t)
    return pairs(x, y).mean() - pairs(x, x).sum() / by_s / 2 - pairs(y, y).sum() / by_t / 2


def broadcast_energy(x, y):
    """Return the V-statistic with all differences in memory, for automatic differentiation."""

    def mean_distance(a, b):
        square = jnp.sum((a[:, :, None, :] - b[:, None, :, :]) ** 2, axis=-1)
        return jnp.mean(jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0), axis=(1, 2))

    return mean_distance(x, y) - 0.5 * mean_distance(x, x) - 0.5 * mean_distance(y, y)


@pytest.fixture
def sets(rng):
    x = rng.gamma(1.0, 1.0, (3, 9, 40)).astype(np.float32)
    y = (rng.gamma(1.0, 1.0, (3, 7, 40)) + 0.3).astype(np.float32)
    return x, y


def test_energy_distance_is_its_definition(sets):
    x, y = sets
    got = energy_distance(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(got.biased, [naive_energy(a, b, False) for a, b in zip(x, y, strict=True)], rtol=2e-5)
    np.testing.assert_allclose(got.unbiased, [naive_energy(a, b, True) for a, b in zip(x, y, strict=True)], rtol=1e-4)


def test_energy_gradient_is_that_of_the_broadcast_form(sets):
    x, y = map(jnp.asarray, sets)
    want = jax.grad(lambda x, y: jnp.sum(broadcast_energy(x, y)), (0, 1))(x, y)
    got = jax.grad(lambda x, y: jnp.sum(energy_distance(x, y).biased), (0, 1))(x, y)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_unbiased_gradient_by_finite_differences(sets):
    x, y = (a[:1].astype(np.float32) for a in sets)
    gradient = jax.grad(lambda x: jnp.sum(energy_distance(x, jnp.asarray(y)).unbiased))(jnp.asarray(x))
    for i, j in ((0, 0), (4, 11), (8, 39)):
        up, down = x[0].astype(np.float64).copy(), x[0].astype(np.float64).copy()
        up[i, j] += 1e-4
        down[i, j] -= 1e-4
        slope = (naive_energy(up, y[0], True) - naive_energy(down, y[0], True)) / 2e-4
        assert abs(float(gradient[0, i, j]) - slope) < 1e-5


def test_energy_of_a_set_with_itself_is_zero_and_flat(sets):
    x = jnp.asarray(sets[0])
    energy = energy_distance(x, x)
    np.testing.assert_allclose(energy.biased, 0.0, atol=1e-5)
    gradient = jax.grad(lambda a: jnp.sum(energy_distance(a, x).biased))(x)
    assert np.isfinite(gradient).all()
    assert float(jnp.abs(gradient).max()) < 1e-4


def test_floor_is_what_a_second_sample_scores(rng):
    s = 32
    draws = rng.gamma(1.0, 1.0, (200, 2, s, 30)).astype(np.float32)
    energy = energy_distance(jnp.asarray(draws[:, 0]), jnp.asarray(draws[:, 1]))
    biased, floor, unbiased = (float(jnp.mean(v)) for v in (energy.biased, energy.floor, energy.unbiased))
    error = float(jnp.std(energy.biased)) / np.sqrt(len(draws))
    assert floor > 20 * error
    assert abs(biased - floor) < 4 * error
    assert abs(unbiased) < 4 * error


def test_bfloat16_products_accumulate_in_float32(sets):
    x, y = sets
    low = [jnp.asarray(a).astype(jnp.bfloat16) for a in (x, y)]
    got = energy_distance(*low)
    assert got.biased.dtype == jnp.float32
    rounded = [np.asarray(a.astype(jnp.float32)) for a in low]
    want = [naive_energy(a, b, False) for a, b in zip(*rounded, strict=True)]
    np.testing.assert_allclose(got.biased, want, rtol=1e-4)  # exact for the rounded values


def test_mean_squared_error(sets):
    x, y = sets
    want = ((x.mean(1) - y.mean(1)) ** 2).sum(-1)
    np.testing.assert_allclose(mean_squared_error(jnp.asarray(x), jnp.asarray(y)), want, rtol=1e-5)


def test_sinkhorn_is_the_assignment_cost_when_cold(rng):
    from scipy.optimize import linear_sum_assignment

    x = rng.normal(size=(2, 8, 5)).astype(np.float32)
    y = rng.normal(size=(2, 8, 5)).astype(np.float32) + 2
    cost = [(pairs(a, b) ** 2 / 2) for a, b in zip(x, y, strict=True)]
    want = [c[linear_sum_assignment(c)].mean() for c in cost]
    got = sinkhorn_divergence(jnp.asarray(x), jnp.asarray(y), blur=0.002, iterations=2000)
    np.testing.assert_allclose(got, want, rtol=0.01)


def test_sinkhorn_of_equal_sets_is_zero_and_pulls_towards_the_target(rng):
    x = rng.normal(size=(1, 8, 5)).astype(np.float32)
    y = x + np.float32(1.0)
    np.testing.assert_allclose(sinkhorn_divergence(jnp.asarray(x), jnp.asarray(x)), 0.0, atol=1e-4)
    gradient = jax.grad(lambda a: jnp.sum(sinkhorn_divergence(a, jnp.asarray(y))))(jnp.asarray(x))
    assert float(jnp.mean(gradient)) < 0


def test_mixture_weighs_each_loss(sets):
    x, y = map(jnp.asarray, sets)
    parts = [set_loss(x, y, {name: 1.0})[0] for name in ("energy", "mse", "sinkhorn")]
    both, _ = set_loss(x, y, {"energy": 0.5, "mse": 2.0, "sinkhorn": 3.0})
    np.testing.assert_allclose(both, 0.5 * parts[0] + 2.0 * parts[1] + 3.0 * parts[2], rtol=1e-5)


def test_no_pairwise_difference_is_ever_held():
    shape = jax.ShapeDtypeStruct((16, 64, 2000), jnp.float32)
    grad = jax.jit(jax.grad(lambda x, y: jnp.sum(energy_distance(x, y).biased)))
    memory = grad.lower(shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 16 * 64 * 2000 * 4  # the broadcast form takes 64 times one input
