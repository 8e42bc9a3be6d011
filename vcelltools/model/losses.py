"""Losses between two sets of cells: energy distance, mean squared error of the means, Sinkhorn divergence.

All take ``x`` (predicted) and ``y`` (measured), (b, s, g) and (b, t, g), and return one float32 value per set.

The energy distance (Székely & Rizzo 2013) has the factor of geomloss, which is half the usual one:
``mean |x-y| - mean |x-x'| / 2 - mean |y-y'| / 2``. It is computed in Gram form, ``|x-y|² = |x|² + |y|² - 2 x·y``,
so that no array of shape (b, s, t, g) is made. The norms are computed from the same values as the product, so that
rounding to bfloat16 cancels. The gradient is written explicitly, as two products of the same size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32
_COINCIDENT = 1e-6  # as a share of |x|² + |y|²: closer pairs coincide in float32 and have no gradient


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == F32 else None


def _squares(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return |x-y|² (b, s, t) and the scale |x|² + |y|², both float32."""
    nx = jnp.sum(jnp.square(x.astype(F32)), axis=-1)
    ny = jnp.sum(jnp.square(y.astype(F32)), axis=-1)
    dot = jnp.einsum("bsg,btg->bst", x, y, preferred_element_type=F32, precision=_precision(x))
    scale = jnp.broadcast_to(nx[:, :, None], dot.shape) + jnp.broadcast_to(ny[:, None, :], dot.shape)
    return jnp.maximum(scale - 2.0 * dot, 0.0), scale


def _distances(x: jax.Array, y: jax.Array, same: bool) -> tuple[jax.Array, jax.Array]:
    """Return the distances (b, s, t) and their inverses, which are zero if two cells coincide or are the same cell."""
    squares, scale = _squares(x, y)
    apart = ~(squares <= _COINCIDENT * scale)  # written so that a NaN does not count as coincident
    if same:
        apart = apart & ~jnp.broadcast_to(jnp.eye(x.shape[1], dtype=bool)[None], apart.shape)
    root = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    return root, jnp.where(apart, 1.0 / jnp.where(apart, root, 1.0), 0.0)


class Energy(NamedTuple):
    """The energy distance of each set, float32 (b,)."""

    biased: jax.Array
    """V-statistic: non-negative, with a lower bound that depends on the size of the set."""
    unbiased: jax.Array
    """U-statistic: zero on average if both sets come from one distribution; it may be negative."""
    floor: jax.Array
    """Expected V-statistic of a second sample from the measured distribution."""


def energy_distance(x: jax.Array, y: jax.Array) -> Energy:
    """Return the V- and U-statistics of the energy distance and the floor, computed from the same distances."""
    terms = _energy_terms(x, y)
    return _combine(*terms, x.shape[1], y.shape[1])


def _combine(xy: jax.Array, xx: jax.Array, yy: jax.Array, s: int, t: int) -> Energy:
    # xx, yy: means over ordered pairs of different cells
    unbiased = xy - 0.5 * xx - 0.5 * yy
    biased = xy - 0.5 * xx * ((s - 1) / s) - 0.5 * yy * ((t - 1) / t)
    return Energy(biased, unbiased, jax.lax.stop_gradient(0.5 * yy * (1 / s + 1 / t)))


@jax.custom_vjp
def _energy_terms(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _energy_forward(x, y)[0]


def _pair_mean(d: jax.Array) -> jax.Array:
    s = d.shape[-1]
    return jnp.sum(d, axis=(-1, -2)) / float(max(s * (s - 1), 1))


def _energy_forward(x, y):
    xy, wxy = _distances(x, y, same=False)
    xx, wxx = _distances(x, x, same=True)
    yy, wyy = _distances(y, y, same=True)
    return (jnp.mean(xy, axis=(-1, -2)), _pair_mean(xx), _pair_mean(yy)), (x, y, wxy, wxx, wyy)


def _pull(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return sum_j w_ij (x_i - y_j), float32 (b, s, g)."""
    rows = jnp.sum(w, axis=-1)[:, :, None]
    towards = jnp.einsum("bst,btg->bsg", w.astype(y.dtype), y, preferred_element_type=F32, precision=_precision(y))
    return jnp.broadcast_to(rows, x.shape) * x.astype(F32) - towards


def _energy_backward(saved, cotangents):
    x, y, wxy, wxx, wyy = saved
    s, t = x.shape[1], y.shape[1]

    def scaled(c, w, by):
        return w * jnp.broadcast_to((c / float(max(by, 1)))[:, None, None], w.shape)

    cross = scaled(cotangents[0], wxy, s * t)
    inner = scaled(cotangents[1], wxx, s * (s - 1) / 2)
    # both gradients of x in one product halve the passes over arrays as large as the cells
    dx = _pull(jnp.concatenate([cross, inner], axis=2), x, jnp.concatenate([y, x], axis=1))
    dy = _pull(cross.swapaxes(1, 2), y, x) + _pull(scaled(cotangents[2], wyy, t * (t - 1) / 2), y, y)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_energy_terms.defvjp(_energy_forward, _energy_backward)


def mean_squared_error(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the squared difference of the sets' means, summed over genes, float32 (b,).

    The sum, not the mean, makes this loss comparable in size to the energy distance, which grows with the square of a
    small shift too.
    """
    difference = jnp.mean(x.astype(F32), axis=1) - jnp.mean(y.astype(F32), axis=1)
    return jnp.sum(jnp.square(difference), axis=-1)


@partial(jax.jit, static_argnames=("iterations",))
def sinkhorn_divergence(x: jax.Array, y: jax.Array, *, blur: float = 0.05, iterations: int = 30) -> jax.Array:
    """Return the debiased Sinkhorn divergence (Feydy et al. 2019) for the cost |x-y|²/2, float32 (b,).

    ``blur`` is the temperature as a share of the mean cost. The gradient is that of the transport cost with a fixed
    plan (envelope theorem), which is exact at convergence.
    """
    cost_scale = jax.lax.stop_gradient(jnp.mean(_squares(x, y)[0], axis=(-1, -2)) / 2 + 1e-12)
    heat = blur * cost_scale

    def transport(a, b):
        cost = _squares(a, b)[0] / 2
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


class LossWeights(NamedTuple):
    """Weights of the losses between sets."""

    energy: float = 1.0
    mse: float = 0.0
    sinkhorn: float = 0.0


class EffectWeights(NamedTuple):
    """Weights of the losses of the mean effect of a set; see :func:`effect_loss`."""

    delta: float = 0.0
    pearson: float = 0.0
    rank: float = 0.0


_SOFTNESS = 0.02  # differences of distances below this share of the effects' scale hardly change the rank


def effect_loss(
    effect: jax.Array,
    measured: jax.Array,
    rivals: jax.Array | None,
    weights: EffectWeights,
    *,
    scale: float,
    counts: jax.Array,
    rival_counts: jax.Array | None = None,
) -> jax.Array:
    """Return the weighted loss (b,) of predicted effects (b, g) against those measured on all cells of the run.

    The measured effect of a run is much more precise than that of a set of its cells, so these losses are less noisy.

    - ``delta``: mean squared error in units of ``scale``.
    - ``pearson``: one minus the correlation over genes.
    - ``rank``: a smooth count of how often the effect is nearer (L1) to the measured effect of another run of the
      context, ``rivals`` (b, r, g), than to that of its own run. This is what perturbation discrimination counts.

    ``counts`` (b, g) selects the genes that count for discrimination, ``rival_counts`` (b, r) the rivals.
    """
    total = jnp.zeros_like(effect[:, 0])
    if weights.delta:
        total = total + weights.delta * jnp.mean(jnp.square(effect - measured), axis=-1) / scale**2
    if weights.pearson:
        a = effect - jnp.mean(effect, axis=-1, keepdims=True)
        b = measured - jnp.mean(measured, axis=-1, keepdims=True)
        norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
        total = total + weights.pearson * (1.0 - jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(norms + 1e-6 * scale**4))
    if weights.rank:
        assert rivals is not None
        assert rival_counts is not None
        mine = jnp.sum(jnp.abs(effect - measured) * counts, axis=-1)
        theirs = jnp.sum(jnp.abs(effect[:, None] - rivals) * counts[:, None], axis=-1)
        behind = jax.nn.softplus((mine[:, None] - theirs) / (_SOFTNESS * scale * effect.shape[-1]))
        shares = jnp.sum(behind * rival_counts, axis=-1) / jnp.maximum(jnp.sum(rival_counts, axis=-1), 1.0)
        total = total + weights.rank * shares
    return total


def set_loss(
    x: jax.Array, y: jax.Array, weights: LossWeights, *, unbiased: bool = False, dtype=F32
) -> tuple[jax.Array, Energy]:
    """Return the weighted loss (b,) of each set, and its energy distances, which do not depend on the weights."""
    low_x, low_y = x.astype(dtype), y.astype(dtype)
    energy = energy_distance(low_x, low_y)
    total = jnp.zeros_like(energy.biased)
    if weights.energy:
        total = total + weights.energy * (energy.unbiased if unbiased else energy.biased)
    if weights.mse:
        total = total + weights.mse * mean_squared_error(x, y)
    if weights.sinkhorn:
        total = total + weights.sinkhorn * sinkhorn_divergence(low_x, low_y)
    return total, Energy(*map(jax.lax.stop_gradient, energy))
