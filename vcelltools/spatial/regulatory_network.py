"""The regulatory network, read from one Parquet file into plain lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from vcelltools.errors import DataError, UsageError
from vcelltools.io.frame import read_frame
from vcelltools.io.textfile import checking

SPECIES = ("mouse", "human")
VARIABLE = "SPACETRAVLR_DATA_DIR"  # SpaceTravLR's variable for the folder of networks
EDGE_TYPES = ("grn", "lr", "nichenet")
_COLUMNS = ("source", "target", "edge_type")
_EXAMPLES = 4


@dataclass(frozen=True)
class Edges:
    """The edges of one type, in the order of the file."""

    source: list[str]
    target: list[str]
    weight: list[float]
    signaling: list[str | None]


@dataclass
class Network:
    """A network file.

    Attributes
    ----------
    path
        The file.
    grn, lr, nichenet
        Edges from TF to gene, from ligand to receptor, and from ligand to TF.
    """

    path: Path
    grn: Edges
    lr: Edges
    nichenet: Edges

    @cached_property
    def tfs_of(self) -> dict[str, list[str]]:
        """TFs of each target, each once, in the order of the file."""
        out: dict[str, dict[str, None]] = {}
        for s, t in zip(self.grn.source, self.grn.target, strict=True):
            out.setdefault(t, {})[s] = None
        return {t: list(s) for t, s in out.items()}

    def pairs(self, panel: set[str]) -> list[tuple[str, str, str | None]]:
        """Return (ligand, receptor, signaling) of all pairs in the panel, each once, in the order of the file.

        A symbol that is not a gene of the panel is split at ``_``. Every ligand part pairs with every receptor part.
        """
        out: dict[tuple[str, str], str | None] = {}
        for s, t, kind in zip(self.lr.source, self.lr.target, self.lr.signaling, strict=True):
            for pair in product(_split(s, panel), _split(t, panel)):
                out.setdefault(pair, kind)
        return [(ligand, receptor, kind) for (ligand, receptor), kind in out.items()]

    def count_matches(self, panel: set[str]) -> dict[str, int]:
        """Return the number of edges of each type whose genes are in the panel."""
        grn = sum(s in panel and t in panel for s, t in zip(self.grn.source, self.grn.target, strict=True))
        tfl = sum(s in panel and t in panel for s, t in zip(self.nichenet.source, self.nichenet.target, strict=True))
        return {"grn": grn, "lr": len(self.pairs(panel)), "nichenet": tfl}

    def need_match(self, genes: Sequence[str]) -> None:
        """Raise a :class:`DataError` if no edge is in the panel."""
        if not any(self.count_matches(set(genes)).values()):
            theirs = list(dict.fromkeys(self.grn.source or self.lr.source))[:_EXAMPLES]
            raise DataError(
                f"{self.path}: no edge matches the genes of the data ({', '.join(genes[:_EXAMPLES])}, … against "
                f"{', '.join(theirs)}, …)",
                hint="check the species, and whether both use gene symbols",
            )


def _split(symbol: str, panel: set[str]) -> list[str]:
    if symbol in panel:
        return [symbol]
    return [part for part in symbol.split("_") if part in panel] if "_" in symbol else []


def guess_species(genes: Sequence[str]) -> str:
    """Return ``mouse`` or ``human``, according to the case of the symbols: Foxp3 or FOXP3."""
    letters = [g for g in genes if any(c.isalpha() for c in g[1:])]
    upper = sum(g.upper() == g for g in letters)
    return "human" if 2 * upper > len(letters) else "mouse"


def find_network(
    *, network: str | os.PathLike | None, folder: str | os.PathLike | None, species: str | None, genes: Sequence[str]
) -> Path:
    """Return the given network file, or else ``{species}_network.parquet`` in the first folder that has it.

    The folders are ``folder``, ``$SPACETRAVLR_DATA_DIR``, and ``data/`` in the working folder and above it.
    """
    if network is not None:
        return Path(network)
    if species is not None and species not in SPECIES:
        raise UsageError(f"species {species!r} is not known", hint=f"one of: {', '.join(SPECIES)}")
    name = f"{species or guess_species(genes)}_network.parquet"
    if folder is not None:
        places = [Path(folder)]
    else:
        said = os.environ.get(VARIABLE)
        here = Path.cwd()
        places = ([Path(said)] if said else []) + [d / "data" for d in (here, *here.parents)]
    for place in places:
        if (place / name).exists():
            return place / name
    looked = ", ".join(str(p) for p in places[:3])
    raise DataError(f"{name} was not found in {looked}", hint="pass the network file, or the folder that holds it")


def read_network(path: str | os.PathLike, tf_prior: str | os.PathLike | None = None) -> Network:
    """Read a network; ``tf_prior``, a table of source and target, replaces its ``grn`` edges.

    Raises
    ------
    DataError
        If it is missing or damaged, lacks a column, or has no edge of a known type.
    """
    p = Path(path)
    rows = _read_rows(p, "a network", _COLUMNS)
    found: dict[str, Edges] = {k: Edges([], [], [], []) for k in EDGE_TYPES}
    with checking(p):
        for source, target, kind, weight, signaling in zip(*rows, strict=True):
            if source is None or target is None or kind not in found:
                continue
            edges = found[kind]
            edges.source.append(str(source))
            edges.target.append(str(target))
            edges.weight.append(float(weight))
            edges.signaling.append(signaling)
    if not any(e.source for e in found.values()):
        raise DataError(f"{p} has no edge of a known type", hint=f"edge_type is one of: {', '.join(EDGE_TYPES)}")
    if tf_prior is not None:
        sources, targets = _read_rows(Path(tf_prior), "a table of TFs and targets", ("source", "target"))[:2]
        found["grn"] = Edges([str(s) for s in sources], [str(t) for t in targets], [1.0] * len(sources), [])
    return Network(p, **found)


def _read_rows(path: Path, what: str, need: tuple[str, ...]) -> list[list]:
    """Return the columns source, target, edge_type, weight, signaling; missing columns are filled."""
    table = read_frame(path, what=what)
    for name in need:
        if name not in table.column_names:
            raise DataError(f"{path} has no column {name!r}", hint=f"columns: {', '.join(table.column_names)}")
    n = table.num_rows
    out = []
    for name, default in (
        ("source", None),
        ("target", None),
        ("edge_type", "grn"),
        ("weight", 1.0),
        ("signaling", None),
    ):
        values = table.column(name).to_pylist() if name in table.column_names else [default] * n
        out.append([default if v is None else v for v in values] if name == "weight" else values)
    return out
