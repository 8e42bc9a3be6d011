"""Losses of the mean effect of a set relative to the effect measured on all cells of its run.

The measured effect of a run is much more precise than that of a set of its cells, so these losses are less noisy than
those between sets. All return one float32 value per set.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_SOFTNESS = 0.02  # differences of distances below this share of the effects' scale hardly change the rank


class MeanEffects(NamedTuple):
    """What a loss of effects compares."""

    effect: jax.Array
    """(b, g) predicted effects."""
    measured: jax.Array
    """(b, g) effects measured on all cells of the run."""
    counts: jax.Array
    """(b, g) one for genes that count for discrimination, otherwise zero."""
    scale: float
    """Typical size of an effect."""
    rivals: jax.Array | None
    """(b, r, g) measured effects of other runs of the context, if a loss needs them."""
    rival_counts: jax.Array | None
    """(b, r) one for rivals that are another run, otherwise zero."""


def get_delta(e: MeanEffects) -> jax.Array:
    """Return the mean squared error in units of the scale."""
    return jnp.mean(jnp.square(e.effect - e.measured), axis=-1) / e.scale**2


def get_pearson(e: MeanEffects) -> jax.Array:
    """Return one minus the correlation over genes."""
    a = e.effect - jnp.mean(e.effect, axis=-1, keepdims=True)
    b = e.measured - jnp.mean(e.measured, axis=-1, keepdims=True)
    norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return 1.0 - jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(norms + 1e-6 * e.scale**4)


def get_rank(e: MeanEffects) -> jax.Array:
    """Return a smooth count of how often a rival is nearer (L1) to the predicted effect than its own run is.

    This is what perturbation discrimination counts.
    """
    assert e.rivals is not None
    assert e.rival_counts is not None
    mine = jnp.sum(jnp.abs(e.effect - e.measured) * e.counts, axis=-1)
    theirs = jnp.sum(jnp.abs(e.effect[:, None] - e.rivals) * e.counts[:, None], axis=-1)
    behind = jax.nn.softplus((mine[:, None] - theirs) / (_SOFTNESS * e.scale * e.effect.shape[-1]))
    return jnp.sum(behind * e.rival_counts, axis=-1) / jnp.maximum(jnp.sum(e.rival_counts, axis=-1), 1.0)
