"""Gene identity: which column of a file is which gene of a basis, and what is not known.

A gene is its Ensembl id without the version where there is one, else its symbol. Columns of the same gene are
duplicates. A symbol that stands for several ids is ambiguous and is never guessed; a gene that a file lacks is
marked missing, which is not the same as zero.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.table import Table
from vcelltools.textfile import read_text

_ENSEMBL = re.compile(r"^(ENS[A-Z]{0,6}[GT]\d{6,})(\.\d+)?(_PAR_Y)?$")
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id", "ensg", "ENSEMBL")
NAME_COLUMNS = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "feature_name", "name", "SYMBOL")


def strip_version(label: str) -> str:
    """Return an Ensembl id without its version (``ENSG00000141510.18``); other labels as they are."""
    m = _ENSEMBL.match(label)
    return m.group(1) + (m.group(3) or "") if m else label


def is_ensembl(label: str | None) -> bool:
    """Say whether a label has the form of an Ensembl gene id."""
    return label is not None and _ENSEMBL.match(label) is not None


@dataclass(frozen=True, kw_only=True)
class Genes:
    """The genes of one file, column by column.

    Attributes
    ----------
    ids
        (n,) object: Ensembl ids without version, None where a column has none.
    names
        (n,) object: symbols (or the var index where there are no symbols).
    id_source, name_source
        Which var columns they came from; None where there is none.
    """

    ids: np.ndarray
    names: np.ndarray
    id_source: str | None
    name_source: str | None

    @property
    def keys(self) -> list[str]:
        """The identity of each column: its id, else its symbol."""
        return [i if i is not None else n for i, n in zip(self.ids, self.names, strict=True)]

    def merge(self, policy: str = "sum") -> Merged:
        """Merge the columns of one gene.

        Parameters
        ----------
        policy
            ``sum`` adds the counts of duplicates; ``first`` keeps them apart and lets the first stand for the gene.
        """
        first: dict[str, int] = {}
        of_column = np.empty(len(self.ids), np.int32)
        columns: list[int] = []
        duplicates: dict[str, int] = {}
        for j, key in enumerate(self.keys):
            k = first.get(key)
            if k is not None:
                duplicates[key] = duplicates.get(key, 1) + 1
            if k is None or policy == "first":
                if k is None:
                    first[key] = len(columns)
                of_column[j] = len(columns)
                columns.append(j)
            else:
                of_column[j] = k
        return Merged(
            of_column=of_column,
            ids=self.ids[columns],
            names=self.names[columns],
            first=first,
            duplicates=duplicates,
            policy=policy,
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The distinct genes of a file.

    Attributes
    ----------
    of_column
        (n,) int32: the gene of each column.
    ids, names
        (m,) object: identity of each gene.
    first
        Key -> gene.
    duplicates
        Key -> number of columns, for keys with more than one.
    policy
        ``sum`` or ``first``.
    """

    of_column: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    first: Mapping[str, int]
    duplicates: Mapping[str, int]
    policy: str


def _find_column(var: Table, wanted: str | None, usual: Iterable[str], test) -> tuple[str | None, np.ndarray | None]:
    """Return (name, labels) of a var column: the one wanted, else the first usual one that passes ``test``."""
    if wanted == "index":
        return "index", var.index
    if wanted is not None:
        return wanted, var.column(wanted).labels()
    if test(var.index):
        return "index", var.index
    for name in usual:
        if name in var.columns:
            labels = var.column(name).labels()
            if test(labels):
                return name, labels
    return None, None


def _mostly_ids(labels: np.ndarray) -> bool:
    some = labels[:: max(1, len(labels) // 200)]
    return len(some) > 0 and sum(is_ensembl(None if x is None else str(x)) for x in some) > len(some) / 2


def _mostly_names(labels: np.ndarray) -> bool:
    return not _mostly_ids(labels)


def read_genes(var: Table, *, id_col: str | None = None, name_col: str | None = None) -> Genes:
    """Read the identity of every column of a file; columns are detected where they are not named.

    Raises
    ------
    DataError
        Where a named column is missing.
    """
    id_source, ids = _find_column(var, id_col, ID_COLUMNS, _mostly_ids)
    name_source, names = _find_column(var, name_col, NAME_COLUMNS, _mostly_names)
    index = var.index
    if ids is None:
        ids = np.full(var.n, None, dtype=object)
    clean_ids = np.array([strip_version(str(x)) if x not in (None, "", "nan", "NA") else None for x in ids], object)
    names = index if names is None else names
    clean_names = np.array(
        [str(x) if x not in (None, "") else str(i) for x, i in zip(names, index, strict=True)], dtype=object
    )
    return Genes(ids=clean_ids, names=clean_names, id_source=id_source, name_source=name_source)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The ordered genes that every store shares.

    Attributes
    ----------
    labels
        The lines of ``basis.txt``.
    ids, symbols
        Identity of each gene, None where it is not known.
    path
        The file, or None.
    """

    labels: tuple[str, ...]
    ids: tuple[str | None, ...]
    symbols: tuple[str | None, ...]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sha256(self) -> str:
        """The hash of the ordered labels."""
        return hashlib.sha256("\n".join(self.labels).encode()).hexdigest()


def read_basis(path: str | os.PathLike) -> Basis:
    """Read a basis: one gene a line (id or symbol); ids and symbols come from the JSON beside it, if there is one.

    Raises
    ------
    DataError
        Where the file is missing, empty or names a gene twice.
    """
    fpath = Path(path)
    text = read_text(
        fpath,
        what="a list of genes, one a line,",
        hint="vcelltools hvg or vcelltools basis writes one",
        missing="no such basis file",
    )
    labels = [line.strip() for line in text.splitlines()]
    labels = [x for x in labels if x and not x.startswith("#")]
    return make_basis(labels, path=fpath, known=_read_known(fpath))


def _read_known(fpath: Path) -> dict[str, tuple[str | None, str | None]]:
    beside = fpath.with_suffix(".json")
    if not beside.exists():
        return {}
    try:
        body: Any = json.loads(beside.read_text(encoding="utf-8"))
        rows = body["genes"]
        return {r["label"]: (r.get("id"), r.get("symbol")) for r in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # some other JSON of that name


def make_basis(
    labels: Iterable[str],
    *,
    path: Path | None = None,
    known: Mapping[str, tuple[str | None, str | None]] | None = None,
) -> Basis:
    """Make a basis from labels; ``known`` gives (id, symbol) of some of them."""
    labels = tuple(labels)
    where = str(path) if path else "the basis"
    if not labels:
        raise DataError(f"{where}: names no gene")
    if len(set(labels)) != len(labels):
        twice = next(x for x in labels if labels.count(x) > 1)
        raise DataError(f"{where}: names {twice!r} twice", hint="each gene once, best first")
    ids, symbols = [], []
    for x in labels:
        gene_id, symbol = (known or {}).get(x, (None, None))
        if is_ensembl(x):
            gene_id = gene_id or strip_version(x)
        else:
            symbol = symbol or x
        ids.append(strip_version(gene_id) if gene_id else None)
        symbols.append(symbol)
    return Basis(labels=labels, ids=tuple(ids), symbols=tuple(symbols), path=path)


def read_aliases(path: str | os.PathLike) -> dict[str, str]:
    """Read a tab-separated table ``alias, symbol or id``; an alias of several genes is dropped as ambiguous."""
    fpath = Path(path)
    hint = "two columns, tab-separated: alias, symbol or id"
    lines = read_text(fpath, what="a table of aliases", hint=hint).splitlines()
    out: dict[str, str] = {}
    bad: set[str] = set()
    for i, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [p.strip() for p in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            raise DataError(f"{fpath}: line {i} is not two columns separated by a tab", hint=hint)
        alias, gene = parts[0], strip_version(parts[1])
        if out.get(alias, gene) != gene:
            bad.add(alias)
        out[alias] = gene
    if not out:
        raise DataError(f"{fpath}: holds no alias", hint=hint)
    return {a: g for a, g in out.items() if a not in bad}


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """How a basis and a file's genes fit.

    Attributes
    ----------
    gene_of
        (G,) int32: the file's (merged) gene of each basis gene, -1 where missing.
    how
        (G,) ``id``, ``symbol``, ``alias``, ``ambiguous`` or ``missing``.
    ambiguous
        Basis label -> the file's candidates, none of which was taken.
    """

    gene_of: np.ndarray
    how: tuple[str, ...]
    ambiguous: Mapping[str, tuple[str, ...]]
    merged: Merged

    @property
    def present(self) -> np.ndarray:
        """(G,) bool: whether the file measures the gene."""
        return self.gene_of >= 0

    def summary(self) -> dict[str, Any]:
        """Return the counts of the reconciliation: by id, symbol, alias; ambiguous, missing, duplicates."""
        counts = {k: self.how.count(k) for k in ("id", "symbol", "alias", "ambiguous", "missing")}
        return {
            "by_id": counts["id"],
            "by_symbol": counts["symbol"],
            "by_alias": counts["alias"],
            "ambiguous": counts["ambiguous"],
            "missing": counts["missing"],
            "coverage": float(self.present.mean()),
            "duplicate_genes": len(self.merged.duplicates),
            "duplicate_policy": self.merged.policy,
        }

    def describe(self) -> str:
        """Return the reconciliation in one line."""
        s = self.summary()
        line = (
            f"genes: {s['by_id']:,} by id, {s['by_symbol']:,} by symbol, {s['by_alias']:,} by alias; "
            f"{s['ambiguous']:,} ambiguous, {s['missing']:,} missing (coverage {s['coverage']:.1%})"
        )
        if s["duplicate_genes"]:
            said = "summed" if self.merged.policy == "sum" else "kept apart, the first one used"
            line += f"; {s['duplicate_genes']:,} genes have several columns ({said})"
        return line


def match_genes(basis: Basis, genes: Genes, *, policy: str = "sum", aliases: Mapping[str, str] | None = None):
    """Find each gene of the basis among a file's: by id, then by symbol, then through the table of aliases.

    Returns
    -------
    Reconciliation
    """
    merged = genes.merge(policy)
    by_id = {g: k for g, k in merged.first.items() if is_ensembl(g)}
    by_name: dict[str, list[int]] = {}
    for k in sorted(set(merged.first.values())):
        by_name.setdefault(merged.names[k], []).append(k)
    aliases = aliases or {}
    back: dict[str, list[str]] = {}  # gene -> its aliases
    for a, g in aliases.items():
        back.setdefault(g, []).append(a)
    gene_of = np.full(len(basis), -1, np.int32)
    how: list[str] = []
    ambiguous: dict[str, tuple[str, ...]] = {}
    for i, (label, gene_id, symbol) in enumerate(zip(basis.labels, basis.ids, basis.symbols, strict=True)):
        if gene_id is not None and gene_id in by_id:
            gene_of[i] = by_id[gene_id]
            how.append("id")
            continue
        hits = by_name.get(symbol, []) if symbol is not None else []
        step = "symbol"
        if not hits:
            other = {aliases[x] for x in (symbol, gene_id) if x is not None and x in aliases}
            other |= {a for x in (symbol, gene_id) if x for a in back.get(x, [])}
            hits = sorted({by_id[x] for x in other if x in by_id} | {k for x in other for k in by_name.get(x, [])})
            step = "alias"
        if len(hits) == 1:
            gene_of[i] = hits[0]
            how.append(step)
        elif hits:
            ambiguous[label] = tuple(str(merged.ids[k] or merged.names[k]) for k in hits)
            how.append("ambiguous")
        else:
            how.append("missing")
    _drop_shared(basis, gene_of, how, ambiguous)
    return Reconciliation(gene_of=gene_of, how=tuple(how), ambiguous=ambiguous, merged=merged)


def _drop_shared(basis: Basis, gene_of: np.ndarray, how: list[str], ambiguous: dict[str, tuple[str, ...]]) -> None:
    """A column that two basis genes claim belongs to the one with the better evidence, or to neither."""
    order = {"id": 0, "symbol": 1, "alias": 2}
    claims: dict[int, list[int]] = {}
    for i, k in enumerate(gene_of.tolist()):
        if k >= 0:
            claims.setdefault(k, []).append(i)
    for group in claims.values():
        if len(group) > 1:
            best = min(order[how[i]] for i in group)
            keep = [i for i in group if order[how[i]] == best]
            for i in group:
                if len(keep) > 1 or i not in keep:
                    gene_of[i] = -1
                    ambiguous[basis.labels[i]] = tuple(basis.labels[j] for j in group if j != i)
                    how[i] = "ambiguous"
