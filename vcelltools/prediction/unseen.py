"""Perturbations that no store has or that were measured in another direction, and combinations of perturbations."""

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
OPPOSITE, NOTHING = "other direction", "no effect"


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
        For each requested name and line: ``measured``, ``other direction`` (measured in another direction and
        converted), ``features``, ``sum of its parts``, ``mean effect``, or ``no effect`` (no perturbation was measured
        in the direction).
    shared
        Positions and lines of the perturbations that are predicted by the mean effect.
    n_known
        Number of perturbations that the stores have.
    """

    setup: Setup
    parts: dict[str, tuple[int, ...]]
    evidence: dict[tuple[str, str], str]
    shared: frozenset[tuple[int, int]]
    n_known: int

    def warn(self) -> list[str]:
        """Return warnings about names that were not measured."""
        out = []
        for kind, how in (
            (SHARED, "predicted by the mean effect"),
            (DESCRIBED, "predicted from features or the network"),
            (SUMMED, "predicted as the sum of the effects of the parts"),
            (OPPOSITE, "predicted from the other direction, with a fitted weight"),
            (NOTHING, "predicted by no effect"),
        ):
            names = {n for (n, _), e in self.evidence.items() if e == kind}
            inside = {n for n in names if n in self.parts and max(self.parts[n]) < self.n_known and kind != SUMMED}
            for some, where in ((names - inside, "in no store"), (inside, "not measured in the requested direction")):
                if some:
                    few = ", ".join(sorted(some)[:5]) + (", ..." if len(some) > 5 else "")
                    what = "1 perturbation is" if len(some) == 1 else f"{len(some):,} perturbations are"
                    out.append(f"{what} {where} ({few}) and {how}")
        return out


def extend(setup: Setup, requests: Iterable[tuple[str, str]], direction: int | None = None) -> Vocabulary:
    """Return the vocabulary for requests (name, line), whose names may be missing from the stores.

    ``A+B`` and ``A|B`` are combinations. ``direction`` is that of the requests, by default that of the measured group,
    or of the perturbations of the line.
    """
    requests = list(dict.fromkeys(requests))
    names = [name for name, _ in requests]
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
        directions = setup.effects.direction_pc
        if directions is not None:
            directions = np.concatenate([directions, np.tile(screen.direction_c, (len(new), 1))])
        effects = replace(
            setup.effects, n_perturbations=len(every), target_p=screen.target_p, features_pf=features,
            network_pp=network, direction_pc=directions,
        )  # fmt: skip
        scaled = None if features is None else standardise(features, len(known))
        setup = replace(setup, screen=screen, effects=effects, features_pf=scaled, raw_features_pf=features)
    parts = {n: tuple(position[m] for m in members[n]) for n in members}
    line_id = {name: i for i, name in enumerate(setup.screen.lines)}
    if direction is not None and setup.effects.direction_pc is not None:
        asked = setup.effects.direction_pc.copy()
        for name, line in requests:
            asked[list(parts[name]), line_id[line]] = direction
        setup = replace(setup, effects=replace(setup.effects, direction_pc=asked))
    evidence, shared = {}, set()
    for name, line in requests:
        c = line_id[line]
        each = {p: _get_evidence(setup, p, c, len(known), features, network) for p in parts[name]}
        shared |= {(p, c) for p, kind in each.items() if kind in (SHARED, NOTHING)}
        kinds = set(each.values())
        alone = len(parts[name]) == 1 or kinds in ({SHARED}, {NOTHING})
        evidence[name, line] = kinds.pop() if alone else SUMMED
    return Vocabulary(setup=setup, parts=parts, evidence=evidence, shared=frozenset(shared), n_known=len(known))


def _split(name: str) -> list[str]:
    parts = [p.strip() for p in _JOINS.split(name)]
    return parts if len(parts) > 1 and all(parts) else [name]


def _get_evidence(
    setup: Setup, p: int, c: int, n_known: int, features: np.ndarray | None, network: np.ndarray | None
) -> str:
    """Return the evidence for the effect of a perturbation in a line."""
    direction = int(setup.effects.get_directions(np.array([p]), np.array([c]))[0])
    view = setup.views.get(direction)
    if view is None:
        return NOTHING
    runs = view.pert_k == p
    if view.borrowed_k is not None and runs.any() and view.borrowed_k[runs].all():
        return OPPOSITE
    if p < n_known and (runs.any() or not (setup.effects.pert_k == p).any()):
        return MEASURED
    kind = setup.settings.model
    if features is None:
        features = setup.effects.features_pf
    if network is None:
        network = setup.effects.network_pp
    by_features = features is not None and bool(np.isfinite(features[p]).all())
    by_network = network is not None and bool(network[p, :n_known].any())
    uses = {
        "neighbours": by_network if network is not None else by_features,
        "kernel-ridge": by_features,
        "ridge": by_features,
        "transformer": by_features and setup.settings.identity is not True,
    }
    return DESCRIBED if uses.get(kind, False) else SHARED
