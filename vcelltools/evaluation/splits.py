"""The splits of an evaluation, from a rule for the held-out groups or from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io.fingerprint import hash_text
from vcelltools.sampling.splits import Split, rank_perturbations, read_split

if TYPE_CHECKING:
    from vcelltools.sampling.effects import Screen
    from vcelltools.stores.store import Store

RULES = ("leave-one-perturbation-out", "leave-one-context-out", "few-shot")
_FEW = 30  # up to this number, perturbations are left out one at a time
_FOLDS = 10


@dataclass(frozen=True, kw_only=True)
class NamedSplit:
    """A split of an evaluation.

    Attributes
    ----------
    family
        The rule or file of the split; tables pool the splits of a family.
    name
        Name of the split within the family.
    among_all
        Whether discrimination compares a held-out group with all groups of its line, and not only with the held-out
        ones. This is needed if a single perturbation is left out.
    """

    family: str
    name: str
    split: Split
    among_all: bool

    @property
    def key(self) -> str:
        """A hash of the content of the split."""
        s = self.split
        few = {f"{d}\0{line}": dict(table) for (d, line), table in s.fewshot.items()}
        zero = {f"{d}\0{line}": part for (d, line), part in s.zeroshot.items()}
        training = None if s.training is None else sorted(s.training)
        return hash_text([json.dumps([training, zero, few, dict(s.heldout), self.among_all], sort_keys=True)])


def make_splits(
    rule: str, stores: Sequence[Store], screen: Screen, *, seen: float = 1 / 3, repeats: int = 1, seed: int = 0
) -> list[NamedSplit]:
    """Return the splits of a rule, or the split of a TOML file.

    Parameters
    ----------
    rule
        ``leave-one-perturbation-out``: hold out each perturbation in every line; more than 30 perturbations are divided
        into ten folds. ``leave-one-context-out``: hold out each line. ``few-shot``: use a seeded share of the
        perturbations of each line for training, and hold out the others.
    seen, repeats, seed
        For ``few-shot``: the share, the number of draws, and the seed.

    Raises
    ------
    DataError
        If no training group is left, or the file does not match the stores.
    """
    groups = screen.groups
    lines = [x for x in screen.places if x in set(groups["line"])]

    def place(name: str) -> tuple[str, str]:
        store, line = screen.places[name]
        return stores[store].name, line

    if rule == RULES[0]:
        perts = [p for p in rank_perturbations(stores, seed) if p in set(groups["perturbation"])]
        if len(perts) < 2:
            raise DataError(f"{RULES[0]} needs at least two perturbations", hint="choose another rule, or add data")
        folds = [[p] for p in sorted(perts)] if len(perts) <= _FEW else [perts[i::_FOLDS] for i in range(_FOLDS)]
        return [
            NamedSplit(
                family=rule, name=f[0] if len(f) == 1 else f"fold {i + 1}", among_all=True,
                split=Split(heldout=dict.fromkeys(f, "test"), where=rule),
            )
            for i, f in enumerate(folds)
        ]  # fmt: skip
    if rule == RULES[1]:
        if len(lines) < 2:
            raise DataError(f"{RULES[1]} needs at least two lines", hint=f"choose {RULES[0]} or {RULES[2]}")
        return [
            NamedSplit(family=rule, name=x, among_all=False, split=Split(zeroshot={place(x): "test"}, where=rule))
            for x in lines
        ]
    if rule == RULES[2]:
        out = []
        for r in range(repeats):
            for i, x in enumerate(lines):
                perts = sorted(groups.loc[groups["line"] == x, "perturbation"])
                order = np.random.default_rng([seed, r, i]).permutation(perts)
                test = [str(p) for p in order[max(1, round(seen * len(perts))) :]]
                if test:
                    split = Split(fewshot={place(x): dict.fromkeys(test, "test")}, where=rule)
                    out.append(NamedSplit(family=rule, name=f"{x}, draw {r + 1}", among_all=False, split=split))
        if not out:
            raise DataError(
                f"few-shot holds out no group if the training share is {seen:g}", hint=f"use a smaller {spell('seen')}"
            )
        return out
    split = read_split(rule, names=[s.name for s in stores])
    split.check(stores)
    return [NamedSplit(family=Path(rule).stem, name=Path(rule).stem, among_all=False, split=split)]
