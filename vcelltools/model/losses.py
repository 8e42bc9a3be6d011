"""Losses between two sets of cells: the energy distance, and the squared error of the means.

All take ``x`` (predicted) and ``y`` (measured), (b, s, g) and (b, t, g), and return one float32 value per set.

The energy distance (Székely & Rizzo 2013) has the factor of geomloss, which is half the usual one:
``mean |x-y| - mean |x-x'| / 2 - mean |y-y'| / 2``. It is computed in Gram form, ``|x-y|² = |x|² + |y|² - 2 x·y``,
so that no array of shape (b, s, t, g) is made. The norms are computed from the same values as the product, so that
rounding to bfloat16 cancels. The gradient is written explicitly, as two products of the same size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32
_COINCIDENT = 1e-6  # as a share of |x|² + |y|²: closer pairs coincide in float32 and have no gradient


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == F32 else None


def squared_distances(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return |x-y|² (b, s, t) and the scale |x|² + |y|², both float32."""
    nx = jnp.sum(jnp.square(x.astype(F32)), axis=-1)
    ny = jnp.sum(jnp.square(y.astype(F32)), axis=-1)
    dot = jnp.einsum("bsg,btg->bst", x, y, preferred_element_type=F32, precision=_precision(x))
    scale = jnp.broadcast_to(nx[:, :, None], dot.shape) + jnp.broadcast_to(ny[:, None, :], dot.shape)
    return jnp.maximum(scale - 2.0 * dot, 0.0), scale


def _distances(x: jax.Array, y: jax.Array, same: bool) -> tuple[jax.Array, jax.Array]:
    """Return the distances (b, s, t) and their inverses, which are zero if two cells coincide or are the same cell."""
    squares, scale = squared_distances(x, y)
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


class Sets(NamedTuple):
    """What a loss between sets of cells compares; the sets of a batch are the first axis."""

    x: jax.Array
    """(b, s, g) float32 predicted cells."""
    y: jax.Array
    """(b, t, g) float32 measured cells."""
    low_x: jax.Array
    """The predicted cells in the precision of matrix products."""
    low_y: jax.Array
    """The measured cells in that precision."""
    energy: Energy
    """Their energy distances, which every step reports."""
    unbiased: bool
    """Whether the U-statistic of the energy distance was requested."""
