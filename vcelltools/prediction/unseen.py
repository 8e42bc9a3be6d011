"""Perturbations that no store has, and combinations of perturbations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.descriptors import read_networks
from vcelltools.sampling.effects import find_targets, read_features
from vcelltools.training.inputs import standardise

if TYPE_CHECKING:
    from vcelltools.training.inputs import Setup

_JOINS = re.compile(r"[+|]")
MEASURED, DESCRIBED, SUMMED, SHARED = "measured", "features", "sum of its parts", "mean effect"


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The perturbations behind each requested name, and the evidence for their effects.

    Attributes
    ----------
    setup
        The set-up, whose vocabulary also has the names that no store has.
    parts
        For each requested name, the positions of the perturbations whose effects are added (one without a combination).
    evidence
        For each requested name, ``measured``, ``features``, ``sum of its parts`` or ``mean effect``.
    shared
        Positions of the perturbations that are predicted by the mean effect.
    """

    setup: Setup
    parts: dict[str, tuple[int, ...]]
    evidence: dict[str, str]
    shared: frozenset[int]

    def warn(self) -> list[str]:
        """Return warnings about names that were not measured."""
        out = []
        for kind, how in (
            (SHARED, "predicted by the mean effect"),
            (DESCRIBED, "predicted from features or the network"),
            (SUMMED, "predicted as the sum of the effects of the parts"),
        ):
            names = sorted(n for n, e in self.evidence.items() if e == kind)
            if names:
                few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                what = "1 perturbation is" if len(names) == 1 else f"{len(names):,} perturbations are"
                out.append(f"{what} in no store ({few}) and {how}")
        return out


def extend(setup: Setup, names: Iterable[str]) -> Vocabulary:
    """Return the vocabulary for names, which may be missing from the stores; ``A+B`` and ``A|B`` are combinations."""
    known = list(setup.screen.perturbations)
    position = {p: i for i, p in enumerate(known)}
    members = {n: [n] if n in position else _split(n) for n in dict.fromkeys(names)}
    new = sorted({m for parts in members.values() for m in parts} - set(known))
    settings = setup.settings
    features = network = None
    if new:
        every = [*known, *new]
        position = {p: i for i, p in enumerate(every)}
        screen = replace(setup.screen, perturbations=every, target_p=find_targets(setup.stores[0], every))
        if settings.features:
            features = read_features(Path(settings.features), every)
        if settings.network:
            network = read_networks(settings.network, every)
        effects = replace(
            setup.effects, n_perturbations=len(every), target_p=screen.target_p, features_pf=features,
            network_pp=network,
        )  # fmt: skip
        scaled = None if features is None else standardise(features, len(known))
        setup = replace(setup, screen=screen, effects=effects, features_pf=scaled, raw_features_pf=features)
    evidence, shared = {}, set()
    for name, parts in members.items():
        each = {position[m]: _get_evidence(setup, position[m], len(known), features, network) for m in parts}
        shared |= {p for p, kind in each.items() if kind == SHARED}
        kinds = set(each.values())
        evidence[name] = (SHARED if kinds == {SHARED} else SUMMED) if len(parts) > 1 else kinds.pop()
    return Vocabulary(
        setup=setup, parts={n: tuple(position[m] for m in parts) for n, parts in members.items()}, evidence=evidence,
        shared=frozenset(shared),
    )  # fmt: skip


def _split(name: str) -> list[str]:
    parts = [p.strip() for p in _JOINS.split(name)]
    return parts if len(parts) > 1 and all(parts) else [name]


def _get_evidence(setup: Setup, p: int, n_known: int, features: np.ndarray | None, network: np.ndarray | None) -> str:
    """Return the evidence for the effect of a perturbation."""
    if p < n_known:
        return MEASURED
    kind = setup.settings.model
    by_features = features is not None and bool(np.isfinite(features[p]).all())
    by_network = network is not None and bool(network[p, :n_known].any())
    uses = {
        "neighbours": by_network if network is not None else by_features,
        "kernel-ridge": by_features,
        "ridge": by_features,
        "transformer": by_features and setup.settings.identity is not True,
    }
    return DESCRIBED if uses.get(kind, False) else SHARED
