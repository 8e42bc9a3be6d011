"""The rules by which gradients change the parameters. To add one, write a function and add a line to ``OPTIMIZERS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as make_muon

Params = dict[str, Any]

MOMENTUM = 0.9
"""Momentum of ``sgd``."""
MUON_RMS = 0.2
"""Root mean square of Muon's updates relative to the learning rate, about that of AdamW's (arXiv 2502.16982)."""


class Rule(NamedTuple):
    """What the rules are made of.

    Attributes
    ----------
    rate
        The learning rate by step.
    b2
        Decay of the second moment.
    weight_decay
        Decoupled weight decay.
    decays
        Returns which parameters have weight decay.
    """

    rate: optax.Schedule
    b2: float
    weight_decay: float
    decays: Callable[[Params], Any]


def adamw(rule: Rule) -> optax.GradientTransformation:
    """Return Adam with decoupled weight decay."""
    return optax.adamw(rule.rate, b2=rule.b2, weight_decay=rule.weight_decay, mask=rule.decays)


def adam(rule: Rule) -> optax.GradientTransformation:
    """Return Adam, without weight decay."""
    return optax.adam(rule.rate, b2=rule.b2)


def sgd(rule: Rule) -> optax.GradientTransformation:
    """Return gradient descent with momentum, without weight decay."""
    return optax.sgd(rule.rate, momentum=MOMENTUM)


def muon(rule: Rule) -> optax.GradientTransformation:
    """Return Muon for the matrices of the transformer's layers, and Adam without weight decay for the other parameters.

    Muon orthogonalises the momentum of each matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon). The
    matrices of all layers are stacked along the first axis.
    """

    def pick(params: Params) -> Any:
        one = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return {
            k: jax.tree.map(lambda w, k=k: one if k == "layers" and w.ndim == 3 else None, v) for k, v in params.items()
        }

    return make_muon(
        rule.rate,
        weight_decay=rule.weight_decay,
        adam_b2=rule.b2,
        muon_weight_dimension_numbers=pick,
        consistent_rms=MUON_RMS,
    )


OPTIMIZERS: dict[str, Callable[[Rule], optax.GradientTransformation]] = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "muon": muon,
}
