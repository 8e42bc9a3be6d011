"""Match the columns of a file with the genes of a basis.

A gene is identified by its Ensembl id without version, or by its symbol if it has no id. Columns of the same gene are
duplicates. A symbol with several ids is ambiguous and is never resolved by a guess. A gene that a file lacks is
marked missing, which is not the same as zero.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.table import Table
from vcelltools.io.textfile import parse_json, read_text
from vcelltools.names import quote_line, read_lines

_ENSEMBL = re.compile(r"^(ENS[A-Z]{0,6}[GT]\d{6,})(\.\d+)?(_PAR_Y)?$")
_ENSEMBL_PREFIX = "ENS"  # most symbols fail this quick test
_BARCODE = re.compile(r"^([A-Za-z0-9]+[_#:-])?[ACGTN]{10,}([_.-].*)?$")
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id", "ensg", "ENSEMBL")
NAME_COLUMNS = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "feature_name", "name", "SYMBOL")


def strip_version(label: str) -> str:
    """Return an Ensembl id without its version (``ENSG00000141510.18``), or any other label unchanged."""
    m = _ENSEMBL.match(label) if label[:3] == _ENSEMBL_PREFIX else None
    return m.group(1) + (m.group(3) or "") if m else label


def is_ensembl(label: str | None) -> bool:
    """Return whether a label has the form of an Ensembl gene id."""
    return label is not None and label[:3] == _ENSEMBL_PREFIX and _ENSEMBL.match(label) is not None


@dataclass(frozen=True, kw_only=True)
class Genes:
    """The genes of one file, column by column.

    Attributes
    ----------
    ids
        (n,) object: Ensembl ids without version, or None.
    names
        (n,) object: symbols, or the var index if there are no symbols.
    id_source, name_source
        The var columns that they came from, or None.
    """

    ids: np.ndarray
    names: np.ndarray
    id_source: str | None
    name_source: str | None

    @property
    def keys(self) -> list[str]:
        """The identity of each column: its id, or its symbol."""
        return [i if i is not None else n for i, n in zip(self.ids, self.names, strict=True)]

    def merge(self, policy: str = "sum") -> Merged:
        """Merge the columns of each gene.

        Parameters
        ----------
        policy
            ``sum`` adds the counts of duplicates; ``first`` uses the first duplicate.
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
    """Return (name, labels) of a var column: the one requested, or the first common one that passes ``test``."""
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


def find_doubts(var: Table, obs: Table) -> list[str]:
    """Return warnings about the genes of a file: a transposed matrix, or names of two kinds.

    A few hundred names of genes and of cells are examined.
    """
    genes, cells = (_take_some(t) for t in (var, obs))
    ids = sum(is_ensembl(x) for x in genes)
    out: list[str] = []
    if not genes or not cells:
        return out
    turned = sum(is_ensembl(x) for x in cells) > len(cells) / 2 or (
        sum(bool(_BARCODE.match(x)) for x in genes) > len(genes) / 2
    )
    if turned:
        out.append(
            f"the matrix may be transposed: its cells are named {cells[0]!r}, …, and its genes {genes[0]!r}, … "
            "(anndata holds cells × genes)"
        )
    elif len(genes) >= 10 and 0.05 < ids / len(genes) < 0.95:
        known = next(x for x in genes if is_ensembl(x))
        other = next(x for x in genes if not is_ensembl(x))
        out.append(
            f"genes are named in two ways: {ids / len(genes):.0%} by Ensembl id ({known!r}) and the others not "
            f"({other!r}); a gene may have two columns"
        )
    return out


def _take_some(table: Table) -> list[str]:
    """Return some names of a table, from its beginning, middle and end."""
    starts = sorted({0, max(table.n // 2 - 100, 0), max(table.n - 200, 0)})
    try:
        return [str(x) for a in starts for x in table.names(a, min(a + 200, table.n))]
    except DataError:  # nothing depends on these names
        return []


def read_ids(var: Table) -> np.ndarray | None:
    """Return (n,) the ids of the columns as stored, or None if the file has no column of Ensembl ids."""
    return _find_column(var, None, ID_COLUMNS, _mostly_ids)[1]


def label_columns(names: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """Return (n,) names of the columns, where a name that several columns share is replaced with their ids."""
    n_each = Counter(names.tolist())
    if ids is None or len(n_each) == len(names):
        return names
    return np.array([i if n_each[n] > 1 and i else n for n, i in zip(names, ids, strict=True)], dtype=object)


def read_genes(var: Table, *, id_col: str | None = None, name_col: str | None = None) -> Genes:
    """Read the identity of every column of a file; var columns that are not named are detected.

    Raises
    ------
    DataError
        If a named column is missing.
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
        Identity of each gene, or None if unknown.
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
        return hashlib.sha256("\n".join(map(quote_line, self.labels)).encode()).hexdigest()


def read_basis(path: str | os.PathLike) -> Basis:
    """Read a basis, with one gene (id or symbol) per line; ids and symbols come from the JSON beside it, if any.

    Raises
    ------
    DataError
        If the file is missing or empty, or lists a gene twice.
    """
    fpath = Path(path)
    text = read_text(
        fpath,
        what="a list of genes, one per line,",
        hint="write one with vcelltools hvg or vcelltools basis",
        missing="the basis file does not exist",
    )
    return make_basis(read_lines(text), path=fpath, known=_read_known(fpath))


def _read_known(fpath: Path) -> dict[str, tuple[str | None, str | None]]:
    beside = fpath.with_suffix(".json")
    if not beside.exists():
        return {}
    try:
        body: Any = parse_json(beside.read_text(encoding="utf-8"))
        rows = body["genes"]
        return {r["label"]: (r.get("id"), r.get("symbol")) for r in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # an unrelated JSON with that name


def make_basis(
    labels: Iterable[str],
    *,
    path: Path | None = None,
    known: Mapping[str, tuple[str | None, str | None]] | None = None,
) -> Basis:
    """Make a basis from labels; ``known`` maps some of them to (id, symbol)."""
    labels = tuple(labels)
    where = str(path) if path else "the basis"
    if not labels:
        raise DataError(f"{where}: lists no gene")
    if len(set(labels)) != len(labels):
        twice = next(x for x in labels if labels.count(x) > 1)
        raise DataError(f"{where} names {twice!r} twice", hint="list each gene once, best first")
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


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """The match between a basis and the genes of a file.

    Attributes
    ----------
    gene_of
        (G,) int32: the (merged) gene of the file for each basis gene, or -1 if missing.
    how
        (G,) ``id``, ``symbol``, ``alias``, ``ambiguous`` or ``missing``.
    ambiguous
        Basis label -> the candidates in the file, none of which is used.
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
        """Return the counts of genes by match: by id, symbol, alias; ambiguous, missing, duplicates."""
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
            said = "summed" if self.merged.policy == "sum" else "kept separate, and the first is used"
            line += f"; {s['duplicate_genes']:,} genes have several columns ({said})"
        return line


def match_genes(basis: Basis, genes: Genes, *, policy: str = "sum", aliases: Mapping[str, str] | None = None):
    """Find each gene of the basis in a file: by id, then by symbol, then by the table of aliases.

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
        if not hits and symbol is not None and symbol in merged.first:  # an id that is not an Ensembl id
            hits = [merged.first[symbol]]
        step = "symbol"
        if not hits:
            other = {aliases[x] for x in (symbol, gene_id) if x is not None and x in aliases}
            other |= {a for x in (symbol, gene_id, *other) if x for a in back.get(x, [])}
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
    """Assign a column that two basis genes match to the one with the better evidence, or to neither."""
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
