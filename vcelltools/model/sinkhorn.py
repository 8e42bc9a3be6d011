"""The Sinkhorn divergence between two sets of cells: the cost of moving one onto the other."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from vcelltools.model.losses import F32, squared_distances


@partial(jax.jit, static_argnames=("iterations",))
def sinkhorn_divergence(x: jax.Array, y: jax.Array, *, blur: float = 0.05, iterations: int = 30) -> jax.Array:
    """Return the debiased Sinkhorn divergence (Feydy et al. 2019) for the cost |x-y|²/2, float32 (b,).

    ``blur`` is the temperature as a share of the mean cost. The gradient is that of the transport cost with a fixed
    plan (envelope theorem), which is exact at convergence.
    """
    cost_scale = jax.lax.stop_gradient(jnp.mean(squared_distances(x, y)[0], axis=(-1, -2)) / 2 + 1e-12)
    heat = blur * cost_scale

    def transport(a, b):
        cost = squared_distances(a, b)[0] / 2
        return _entropic_cost(cost, heat, iterations)

    return transport(x, y) - 0.5 * transport(x, x) - 0.5 * transport(y, y)


def _entropic_cost(cost: jax.Array, heat: jax.Array, iterations: int) -> jax.Array:
    fixed = jax.lax.stop_gradient(cost) / heat[:, None, None]
    s, t = cost.shape[1:]
    log_s, log_t = -jnp.log(jnp.asarray(s, F32)), -jnp.log(jnp.asarray(t, F32))

    def round_(_, potentials):
        f, g = potentials  # averaged updates prevent oscillation of symmetric problems
        f2 = -jax.nn.logsumexp(jnp.broadcast_to(g[:, None, :], fixed.shape) + log_t - fixed, axis=2)
        g2 = -jax.nn.logsumexp(jnp.broadcast_to(f[:, :, None], fixed.shape) + log_s - fixed, axis=1)
        return 0.5 * (f + f2), 0.5 * (g + g2)

    zeros = jnp.zeros_like(fixed[:, :, 0]), jnp.zeros_like(fixed[:, 0, :])
    f, g = jax.lax.fori_loop(0, iterations, round_, zeros)
    f = -jax.nn.logsumexp(jnp.broadcast_to(g[:, None, :], fixed.shape) + log_t - fixed, axis=2)
    total = jnp.broadcast_to(f[:, :, None], fixed.shape) + jnp.broadcast_to(g[:, None, :], fixed.shape)
    plan = jnp.exp(total - fixed + log_s + log_t)
    value = heat * (jnp.mean(f, axis=-1) + jnp.mean(g, axis=-1))
    moved = jnp.sum(jax.lax.stop_gradient(plan) * cost, axis=(-1, -2))
    return moved + jax.lax.stop_gradient(value - moved)
