"""The losses of the transformer. To add one, write a file with a function and add a line to ``LOSSES``.

The function takes :class:`vcelltools.model.losses.Sets` or :class:`vcelltools.model.effect_losses.MeanEffects` and
returns (b,) float32, one value per set. ``losses = {NAME = 0.5}`` in ``[train]`` then sets its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vcelltools.model.effect_losses import MeanEffects, get_delta, get_pearson, get_rank
from vcelltools.model.losses import F32, Energy, Sets, energy_distance, mean_squared_error
from vcelltools.model.sinkhorn import sinkhorn_divergence


@dataclass(frozen=True)
class Loss:
    """A loss, and what it needs.

    Attributes
    ----------
    of
        ``"sets"`` of cells, which train the network, or mean ``"effects"``, which train its judge.
    compute
        The function of a batch.
    rivals
        Whether batches must contain the effects of other runs of the context.
    """

    of: Literal["sets", "effects"]
    compute: Callable[[Any], jax.Array]
    rivals: bool = False


LOSSES: dict[str, Loss] = {
    "energy": Loss("sets", lambda s: s.energy.unbiased if s.unbiased else s.energy.biased),
    "mse": Loss("sets", lambda s: mean_squared_error(s.x, s.y)),
    "sinkhorn": Loss("sets", lambda s: sinkhorn_divergence(s.low_x, s.low_y)),
    "delta": Loss("effects", get_delta),
    "pearson": Loss("effects", get_pearson),
    "rank": Loss("effects", get_rank, rivals=True),
}


def need_rivals(weights: Mapping[str, float]) -> bool:
    """Return whether a loss with a weight needs the effects of other runs."""
    return any(LOSSES[name].rivals for name, weight in weights.items() if weight)


def have_effects(weights: Mapping[str, float]) -> bool:
    """Return whether a loss of mean effects has a weight."""
    return any(LOSSES[name].of == "effects" for name, weight in weights.items() if weight)


def _add(of: str, weights: Mapping[str, float], batch: Any, zero: jax.Array) -> jax.Array:
    for name, loss in LOSSES.items():
        if loss.of == of and weights.get(name):
            zero = zero + weights[name] * loss.compute(batch)
    return zero


def set_loss(
    x: jax.Array, y: jax.Array, weights: Mapping[str, float], *, unbiased: bool = False, dtype=F32
) -> tuple[jax.Array, Energy]:
    """Return the weighted loss (b,) of each set, and its energy distances, which do not depend on the weights."""
    low_x, low_y = x.astype(dtype), y.astype(dtype)
    energy = energy_distance(low_x, low_y)
    total = _add("sets", weights, Sets(x, y, low_x, low_y, energy, unbiased), jnp.zeros_like(energy.biased))
    return total, Energy(*map(jax.lax.stop_gradient, energy))


def effect_loss(effects: MeanEffects, weights: Mapping[str, float]) -> jax.Array:
    """Return the weighted loss (b,) of the mean effects."""
    return _add("effects", weights, effects, jnp.zeros_like(effects.effect[:, 0]))
