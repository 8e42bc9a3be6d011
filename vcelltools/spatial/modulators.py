"""The possible regulators of a target gene: TFs of the cell, ligand-receptor pairs, ligand-TF pairs, and extras."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vcelltools.errors import UsageError
from vcelltools.io.textfile import read_text
from vcelltools.spatial.regulatory_network import Network
from vcelltools.spatial.tissue import Tissue

MOST_LIGANDS_OF_A_TF = 5
TF, LR, TFL, EXTRA = "tf", "lr", "tfl", "extra"
KINDS = (TF, LR, TFL, EXTRA)


@dataclass(frozen=True)
class Modulators:
    """The modulators of one target, in the order of the columns.

    Attributes
    ----------
    tf
        Names of TFs.
    lr
        (ligand, receptor) pairs.
    tfl
        (ligand, TF) pairs.
    extra
        Names of further genes.
    """

    tf: tuple[str, ...] = ()
    lr: tuple[tuple[str, str], ...] = ()
    tfl: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """``TF``, ``L$R``, ``L#TF`` and extras, in order."""
        return [*self.tf, *(f"{a}${b}" for a, b in self.lr), *(f"{a}#{b}" for a, b in self.tfl), *self.extra]

    @property
    def n(self) -> int:
        """Number of modulators."""
        return len(self.tf) + len(self.lr) + len(self.tfl) + len(self.extra)

    @cached_property
    def genes(self) -> list[str]:
        """All genes of the modulators, each once."""
        pairs = [g for pair in (*self.lr, *self.tfl) for g in pair]
        return list(dict.fromkeys([*self.tf, *pairs, *self.extra]))

    @cached_property
    def ligands(self) -> list[str]:
        """All ligands, each once."""
        return list(dict.fromkeys(a for a, _ in (*self.lr, *self.tfl)))

    def to_json(self) -> dict[str, list[str]]:
        """Return the names by kind."""
        return {
            TF: list(self.tf),
            LR: [f"{a}${b}" for a, b in self.lr],
            TFL: [f"{a}#{b}" for a, b in self.tfl],
            EXTRA: list(self.extra),
        }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of modulators; by default all those of the network."""

    cutoff: float = 0.15
    max_ligands: int | None = None
    extra_modulators: tuple[str, ...] = ()
    extra_lr: tuple[str, ...] = ()
    use_tf: bool = True
    use_lr: bool = True
    use_tfl: bool = True


class Finder:
    """Finds the modulators of any target of one tissue."""

    def __init__(self, tissue: Tissue, network: Network, choice: Choice) -> None:
        network.need_match(tissue.genes)
        self._network, self._choice = network, choice
        self.panel = set(tissue.genes)
        self.all_pairs = network.pairs(self.panel)
        pairs = [(a, b) for a, b, _ in self.all_pairs]
        if choice.max_ligands is not None:
            ligands = list(dict.fromkeys(a for a, _ in pairs))
            means = dict(zip(ligands, tissue.expression(ligands).mean(0), strict=True)) if ligands else {}
            top = set(sorted(ligands, key=lambda g: (-means[g], g))[: choice.max_ligands])
            pairs = [p for p in pairs if p[0] in top]
        self._pairs = pairs
        self._paired = {g for p in pairs for g in p}
        self._extra_pairs = [split_pair(p) for p in choice.extra_lr]
        tissue.need_genes([g for p in self._extra_pairs for g in p], "gene of an extra ligand-receptor pair,")
        tissue.need_genes(choice.extra_modulators, "extra modulator")
        self._tfl = self._get_ligands_of_tfs()

    def _get_ligands_of_tfs(self) -> list[tuple[str, str, float]]:
        """Return (ligand, TF, weight) above the cutoff; each pair once, with its first row."""
        seen: dict[tuple[str, str], float] = {}
        e = self._network.nichenet
        for ligand, tf, weight in zip(e.source, e.target, e.weight, strict=True):
            if ligand in self.panel and tf in self.panel:
                seen.setdefault((ligand, tf), weight)
        return [(a, b, w) for (a, b), w in seen.items() if w > self._choice.cutoff]

    def find(self, target: str) -> Modulators:
        """Return the modulators of one target."""
        c = self._choice
        tf = [t for t in self._network.tfs_of.get(target, []) if t in self.panel and t != target]
        lr = [p for p in self._pairs if target not in p] if target in self._paired else self._pairs
        tfl = self._find_tfl(tf, {a for a, _ in lr}) if tf and self._tfl else []
        if self._extra_pairs:
            lr = list(dict.fromkeys([*lr, *(p for p in self._extra_pairs if target not in p)]))
        extra: list[str] = []
        if c.extra_modulators:
            taken = {target, *tf, *(g for p in (*lr, *tfl) for g in p)}
            extra = [g for g in dict.fromkeys(c.extra_modulators) if g not in taken]
        return Modulators(
            tf=tuple(tf) if c.use_tf else (),
            lr=tuple(lr) if c.use_lr else (),
            tfl=tuple(tfl) if c.use_tfl else (),
            extra=tuple(extra),
        )

    def _find_tfl(self, tf: list[str], ligands: set[str]) -> list[tuple[str, str]]:
        """Return the (ligand, TF) pairs of a target: the ligands of each TF with the largest weights, in row order."""
        wanted = set(tf)
        rows = [(i, t, w) for i, (ligand, t, w) in enumerate(self._tfl) if t in wanted and ligand in ligands]
        by_tf: dict[str, list[tuple[float, int]]] = {}
        for i, t, w in rows:
            by_tf.setdefault(t, []).append((-w, i))
        keep = sorted(i for found in by_tf.values() for _, i in sorted(found)[:MOST_LIGANDS_OF_A_TF])
        return [self._tfl[i][:2] for i in keep]


def split_pair(name: str) -> tuple[str, str]:
    """Return (ligand, receptor) of ``L$R``."""
    parts = name.split("$")
    if len(parts) != 2 or not all(parts):
        raise UsageError(f"{name!r} is not a ligand-receptor pair", hint="write LIGAND$RECEPTOR")
    return parts[0], parts[1]


def read_names(values: Sequence[str] | str | None, path: str | os.PathLike | None = None) -> tuple[str, ...]:
    """Return names from a list or comma-separated text, and from a file (lines or commas; ``#`` starts a comment)."""
    parts = [values] if isinstance(values, str) else list(values or [])
    if path is not None:
        text = read_text(Path(path), what="a list of names")
        parts += [line.split("#", 1)[0] for line in text.splitlines()]
    names: list[Any] = [n.strip() for part in parts for n in re.split(r"[,\n]", part)]
    return tuple(dict.fromkeys(n for n in names if n))
