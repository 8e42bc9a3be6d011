"""Perturbations that no store has or that were measured in another direction, and combinations of perturbations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.descriptors import read_networks
from vcelltools.model.combination import Interaction, need_parts
from vcelltools.sampling.effects import find_parts, find_targets, read_features, split_name
from vcelltools.training.inputs import standardise

if TYPE_CHECKING:
    from vcelltools.training.inputs import Setup

MEASURED, DESCRIBED, SUMMED, SHARED = "measured", "features", "sum of its parts", "mean effect"
FITTED, OPPOSITE, NOTHING, HELD = "fitted combination", "other direction", "no effect", "held out"


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The perturbation behind each requested name, and the evidence for its effects.

    Attributes
    ----------
    setup
        The set-up, whose vocabulary also has the names that no store has.
    position
        For each requested name, its position in the vocabulary.
    evidence
        For each requested name and line: ``measured``, ``other direction`` (measured in another direction and
        converted), ``features``, ``sum of its parts``, ``fitted combination`` (of its parts, with a fitted
        interaction), ``mean effect``, ``held out`` (of training, and predicted from what the other perturbations have
        in common), or ``no effect`` (no perturbation was measured in the direction).
    shared
        Positions and lines of the perturbations that are predicted by the mean effect.
    held
        Positions of the perturbations that the stores have, but no training group.
    n_known
        Number of perturbations that the stores have.
    """

    setup: Setup
    position: dict[str, int]
    evidence: dict[tuple[str, str], str]
    shared: frozenset[tuple[int, int]]
    held: frozenset[int]
    n_known: int

    def warn(self) -> list[str]:
        """Return warnings about names that were not measured."""
        out = []
        for kind, how in (
            (SHARED, "predicted by the mean effect"),
            (DESCRIBED, "predicted from features or the network"),
            (SUMMED, "predicted as the sum of the effects of the parts"),
            (FITTED, "predicted from the effects of the parts, with a fitted interaction"),
            (OPPOSITE, "predicted from the other direction, with a fitted weight"),
            (HELD, "predicted from what the others have in common"),
            (NOTHING, "predicted by no effect"),
        ):
            names = {n for (n, _), e in self.evidence.items() if e == kind}
            inside = {n for n in names if self.position[n] < self.n_known and kind not in (SUMMED, FITTED)}
            held = {n for n in inside if self.position[n] in self.held}
            for some, where in (
                (names - inside, "in no store"),
                (held, "held out of training"),
                (inside - held, "not measured in the requested direction"),
            ):
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
    known = list(setup.screen.perturbations)
    position = {p: i for i, p in enumerate(known)}
    joined = {both: i for p, i in position.items() if (both := split_name(p))}  # A+B is the same as B|A
    names = dict.fromkeys(name for name, _ in requests)
    new = {n: split_name(n) for n in names if n not in position and split_name(n) not in joined}
    singles = {m for n, both in new.items() for m in both or (n,)} - set(known)
    every = [*known, *sorted({*new, *singles})]
    setup = _add_names(setup, known, every, described=bool(singles))
    position = {p: i for i, p in enumerate(every)}
    at = {n: position.get(n, joined.get(split_name(n), -1)) for n in names}
    line_id = {name: i for i, name in enumerate(setup.screen.lines)}
    if direction is not None and setup.effects.direction_pc is not None:
        asked = setup.effects.direction_pc.copy()
        for name, line in requests:
            for p in (at[name], *(setup.effects.parts_p or {}).get(at[name], ())):
                asked[p, line_id[line]] = direction
        setup = replace(setup, effects=replace(setup.effects, direction_pc=asked))
    form = Interaction(setup.effects).form if setup.effects.parts_p else "sum"
    held = frozenset(set(range(len(known))) - set(setup.effects.pert_k.tolist()))
    evidence, shared = {}, set()
    for name, line in requests:
        p, c = at[name], line_id[line]
        parts = (setup.effects.parts_p or {}).get(p, (p,))
        if not need_parts(setup.effects, p, c, _get_direction(setup, p, c)):
            parts = (p,)
        each = {m: _get_evidence(setup, m, c, len(known), held) for m in parts}
        shared |= {(m, c) for m, kind in each.items() if kind in (SHARED, NOTHING)}
        kinds = set(each.values())
        if len(parts) == 1 or kinds in ({SHARED}, {HELD}, {NOTHING}):
            evidence[name, line] = kinds.pop()
        else:
            evidence[name, line] = FITTED if form != "sum" and len(parts) == 2 else SUMMED
    return Vocabulary(setup=setup, position=at, evidence=evidence, shared=frozenset(shared), held=held,
                      n_known=len(known))  # fmt: skip


def _add_names(setup: Setup, known: list[str], every: list[str], *, described: bool) -> Setup:
    """Return the set-up with further names; with ``described``, their features and network are read."""
    if len(every) == len(known):
        return setup
    settings, n_new = setup.settings, len(every) - len(known)
    features, network = setup.effects.features_pf, setup.effects.network_pp
    screen = replace(setup.screen, perturbations=every, target_p=find_targets(setup.stores[0], every))
    if described and settings.features:
        features = read_features(Path(settings.features), every)
    elif features is not None:
        features = np.concatenate([features, np.full((n_new, features.shape[1]), np.nan)])
    if described and settings.network:
        network = read_networks(settings.network, every)
    elif network is not None:
        network = np.pad(network, ((0, n_new), (0, n_new)))
    directions = setup.effects.direction_pc
    if directions is not None:
        directions = np.concatenate([directions, np.tile(screen.direction_c, (n_new, 1))])
    effects = replace(
        setup.effects, n_perturbations=len(every), target_p=screen.target_p, features_pf=features, network_pp=network,
        direction_pc=directions, parts_p=find_parts(every),
    )  # fmt: skip
    scaled = None if features is None else standardise(features, len(known))
    return replace(setup, screen=screen, effects=effects, features_pf=scaled, raw_features_pf=features)


def _get_direction(setup: Setup, p: int, c: int) -> int:
    return int(setup.effects.get_directions(np.array([p]), np.array([c]))[0])


def _get_evidence(setup: Setup, p: int, c: int, n_known: int, held: frozenset[int]) -> str:
    """Return the evidence for the effect of a single perturbation in a line."""
    view = setup.views.get(_get_direction(setup, p, c))
    if view is None:
        return NOTHING
    runs = view.pert_k == p
    if view.borrowed_k is not None and runs.any() and view.borrowed_k[runs].all():
        return OPPOSITE
    if runs.any():
        return MEASURED
    kind, features, network = setup.settings.model, setup.effects.features_pf, setup.effects.network_pp
    by_features = features is not None and bool(np.isfinite(features[p]).all())
    by_network = network is not None and bool(network[p, :n_known].any())
    uses = {
        "neighbours": by_network if network is not None else by_features,
        "kernel-ridge": by_features,
        "ridge": by_features,
        "transformer": by_features and setup.settings.identity is not True,
    }
    return DESCRIBED if uses.get(kind, False) else HELD if p in held else SHARED
