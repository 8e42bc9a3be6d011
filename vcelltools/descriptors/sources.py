"""Read the sources of features, each into a table of genes with labels and a row of numbers for every label.

The name and the content determine the kind of a source. A folder with a manifest is a store. ``.gmt`` files are gene
sets, ``.gaf`` files are annotations, and ``.parquet``, ``.npz``, ``.npy`` and ``.h5ad`` files are tables of numbers. A
``.csv``, ``.tsv`` or ``.txt`` file is an edge list if its second column holds names, and a table if it holds numbers.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.genes.identity import Genes, is_ensembl, make_basis, match_genes, strip_version
from vcelltools.io import open_dataset
from vcelltools.io.obsm import list_obsm, read_obsm
from vcelltools.io.textfile import read_text
from vcelltools.names import split_lines
from vcelltools.stores.format import MANIFEST
from vcelltools.stores.store import open_store

if TYPE_CHECKING:
    from scipy import sparse

_CONTROLS = 20_000  # maximum number of control cells for the co-expression
_TEXT_HINT = "an edge list has two gene names per line and optionally a weight; a table has names first, then numbers"


class Edge(NamedTuple):
    """An edge of a network."""

    a: str
    b: str
    weight: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A table of genes.

    Attributes
    ----------
    name
        Name of the file, without its extension.
    kind
        ``edges``, ``gene sets``, ``annotations``, ``table`` or ``co-expression``.
    labels
        Names of the rows.
    values
        (n, f) float64, dense or CSR; finite.
    """

    name: str
    kind: str
    labels: list[str]
    values: np.ndarray | sparse.csr_matrix

    @property
    def genes(self) -> Genes:
        """Genes of the rows."""
        ids = [strip_version(x) if is_ensembl(x) else None for x in self.labels]
        return Genes(
            ids=np.array(ids, object), names=np.array(self.labels, object), id_source="index", name_source="index"
        )


def read_source(path: str | Path, *, varm: str | None = None, dims: int = 64) -> Source:
    """Read a source of features; ``varm`` is a key in an h5ad file, ``dims`` the maximum number of columns of a store.

    Raises
    ------
    DataError
        If the file is of none of the kinds, or is damaged.
    """
    fpath = Path(path)
    name = fpath.name.removesuffix(".gz").rsplit(".", 1)[0] or fpath.name
    if (fpath / MANIFEST).exists():
        return _read_store(fpath, name, dims)
    ends = "".join(fpath.suffixes[-2:]).lower()
    if ends.endswith((".gmt", ".gmt.gz")):
        return _make_membership(name, "gene sets", _read_gmt(fpath), str(fpath))
    if ends.endswith((".gaf", ".gaf.gz")):
        return _make_membership(name, "annotations", _read_gaf(fpath), str(fpath))
    if ends.endswith((".parquet", ".npz", ".npy", ".h5ad")):
        return _check(Source(name=name, kind="table", labels=(t := _read_numbers(fpath, varm))[0], values=t[1]), fpath)
    rows = _read_delimited(fpath)
    if _is_number(rows[-1][1]):
        body = rows if _is_number(rows[0][1]) else rows[1:]
        try:
            values = np.array([[float(x) for x in r[1:]] for r in body])
        except ValueError as e:
            raise DataError(f"{fpath} is not a table of numbers with names first: {e}", hint=_TEXT_HINT) from e
        return _check(Source(name=name, kind="table", labels=[r[0] for r in body], values=values), fpath)
    return _make_adjacency(name, read_edges(fpath))


def read_edges(path: str | Path) -> list[Edge]:
    """Read an edge list from a CSV or TSV file: two names, and a weight if there is a third column.

    A first line whose third column is not a number is a header. A header with two columns is read as an edge between
    two names, which match no gene.

    Raises
    ------
    DataError
        If a line has less than two names, or a weight that is not a positive number.
    """
    rows = _read_delimited(Path(path))
    if len(rows[0]) > 2 and not _is_number(rows[0][2]):
        rows = rows[1:]
    out = []
    for i, row in enumerate(rows, 1):
        weight = row[2] if len(row) > 2 and row[2] != "" else "1"
        if not (row[0] and row[1]):
            raise DataError(
                f"{path}: line {i} has {len([x for x in row[:2] if x])} genes instead of two", hint=_TEXT_HINT
            )
        if not _is_number(weight) or not 0 < float(weight) < math.inf:
            raise DataError(f"{path}: line {i}: the weight {weight!r} is not a positive number", hint=_TEXT_HINT)
        out.append(Edge(row[0], row[1], float(weight)))
    if not out:
        raise DataError(f"{path} has no edges", hint=_TEXT_HINT)
    return out


def read_networks(paths: Sequence[str | Path], names: Sequence[str]) -> np.ndarray:
    """Return the weights (p, p) of the edges between some perturbations, symmetric and summed over the files.

    Raises
    ------
    DataError
        If a file cannot be read, or no file has an edge between two of the perturbations.
    """
    out = np.zeros((len(names), len(names)))
    for path in paths:
        edges = read_edges(path)
        labels = sorted({x for e in edges for x in (e.a, e.b)})
        ids = np.array([strip_version(x) if is_ensembl(x) else None for x in labels], object)
        genes = Genes(ids=ids, names=np.array(labels, object), id_source=None, name_source=None)
        found = match_genes(make_basis(names), genes)
        at: dict[str, int] = {}
        for i, k in enumerate(found.gene_of.tolist()):
            if k >= 0:
                at[str(found.merged.names[k])] = i
        one = np.zeros_like(out)
        for a, b, weight in edges:
            i, j = at.get(a, -1), at.get(b, -1)
            if i >= 0 and j >= 0 and i != j:  # an edge that is listed in both directions counts once
                one[i, j] = one[j, i] = max(one[i, j], weight)
        out += one
    if not out.any():
        raise DataError(
            f"{', '.join(map(str, paths))}: no edge connects two of the {len(names):,} perturbations",
            hint=f"compare the names: the stores have {', '.join(map(str, names[1:4]))}",
        )
    return out


def _read_delimited(fpath: Path) -> list[list[str]]:
    """Return the cells of a text file, split at tabs if the first line has one, otherwise at commas or spaces."""
    text = read_text(fpath, what="an edge list or a table", hint=_TEXT_HINT)
    lines = [x for x in split_lines(text) if x.strip() and not x.startswith("#")]
    if not lines:
        raise DataError(f"{fpath} is empty", hint=_TEXT_HINT)
    mark = next((m for m in ("\t", ",", ";") if m in lines[0]), " ")
    rows = [[c.strip() for c in row] for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=mark)]
    width = len(rows[0])
    for i, row in enumerate(rows, 1):
        if len(row) < 2 or len(row) != width:
            raise DataError(f"{fpath}: line {i} has {len(row)} columns, but the first has {width}", hint=_TEXT_HINT)
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_gmt(fpath: Path) -> dict[str, set[str]]:
    """Return the genes of each set; a line has the name, a description and the genes, separated by tabs."""
    sets: dict[str, set[str]] = {}
    for i, line in enumerate(split_lines(read_text(fpath, what="gene sets (GMT)")), 1):
        if line.strip():
            parts = line.split("\t")
            if len(parts) < 3:
                raise DataError(f"{fpath}: line {i} does not have a name, a description and genes, separated by tabs")
            sets.setdefault(parts[0], set()).update(x.strip() for x in parts[2:] if x.strip())
    return sets


def _read_gaf(fpath: Path) -> dict[str, set[str]]:
    """Return the genes of each term of an annotation file (GAF 2): symbol in column 3, term in 5, ``NOT`` left out."""
    terms: dict[str, set[str]] = {}
    for i, line in enumerate(split_lines(read_text(fpath, what="annotations (GAF)")), 1):
        if line.startswith("!") or not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) < 15:
            raise DataError(f"{fpath}: line {i} has {len(parts)} columns, but a GAF file has at least 15")
        if "NOT" not in parts[3].split("|"):
            terms.setdefault(parts[4], set()).add(parts[2].strip())
    return terms


def _make_membership(name: str, kind: str, sets: dict[str, set[str]], where: str) -> Source:
    """Return genes × sets: members have 1/√(size of the set), so that large sets do not dominate."""
    from scipy import sparse

    used = {k: v for k, v in sets.items() if len(v) > 1}
    labels = sorted({g for v in used.values() for g in v})
    if not labels:
        raise DataError(f"{where} has no set of at least two genes")
    at = {g: i for i, g in enumerate(labels)}
    rows = [at[g] for v in used.values() for g in sorted(v)]
    columns = np.repeat(np.arange(len(used)), [len(v) for v in used.values()])
    values = np.repeat([1 / math.sqrt(len(v)) for v in used.values()], [len(v) for v in used.values()])
    matrix = sparse.csr_matrix((values, (rows, columns)), (len(labels), len(used)))
    return Source(name=name, kind=kind, labels=labels, values=matrix)


def _make_adjacency(name: str, edges: Iterable[Edge]) -> Source:
    """Return the normalised adjacency of a network with self-loops, ``D^-1/2 (A + I) D^-1/2`` (Kipf & Welling 2017)."""
    from scipy import sparse

    edges = [e for e in edges if e.a != e.b]
    labels = sorted({x for e in edges for x in (e.a, e.b)})
    at = {g: i for i, g in enumerate(labels)}
    pairs: dict[tuple[int, int], float] = {}
    for e in edges:
        key = (min(at[e.a], at[e.b]), max(at[e.a], at[e.b]))
        pairs[key] = max(pairs.get(key, 0.0), e.weight)
    i, j = np.array(list(pairs), np.int64).reshape(-1, 2).T
    w = np.array(list(pairs.values()))
    w = w / w.max()
    n = len(labels)
    half = sparse.csr_matrix((w, (i, j)), (n, n))
    matrix = half + half.T + sparse.identity(n)
    root = sparse.diags(1 / np.sqrt(np.asarray(matrix.sum(axis=1)).ravel()))
    return Source(name=name, kind="edges", labels=labels, values=sparse.csr_matrix(root @ matrix @ root))


def _read_numbers(fpath: Path, varm: str | None) -> tuple[list[str], np.ndarray]:
    """Return the names and numbers of a ``.parquet``, ``.npz`` (``names``, ``values``), ``.npy`` or ``.h5ad``."""
    hint = "put the names in the first column, or for .npy in a text file of the same name"
    try:
        if fpath.suffix == ".parquet":
            import pandas as pd

            table = pd.read_parquet(fpath)
            if isinstance(table.index, pd.RangeIndex):
                table = table.set_index(table.columns[0])
            return table.index.astype(str).tolist(), table.to_numpy(np.float64)
        if fpath.suffix == ".npz":
            with np.load(fpath, allow_pickle=False) as z:
                return z["names"].astype(str).tolist(), np.asarray(z["values"], np.float64)
        if fpath.suffix == ".npy":
            names = split_lines(read_text(fpath.with_suffix(".txt"), what="the names of the rows", hint=hint))
            return [x.strip() for x in names if x.strip()], np.load(fpath, allow_pickle=False).astype(np.float64)
    except FileNotFoundError as e:
        raise DataError(f"{fpath}: no such file", hint=hint) from e
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
        raise DataError(f"{fpath} is not a table of numbers with names: {e}", hint=hint) from e
    with open_dataset(fpath) as data:
        labels = [str(x) for x in data.var.index]
    names = list_obsm(fpath, "varm")
    if varm is None and len(names) != 1:
        raise DataError(
            f"{fpath}: varm has {len(names)} arrays: {', '.join(names)}", hint=f"set {spell('varm')} to one of them"
        )
    return labels, read_obsm(fpath, varm or names[0], len(labels), "varm")


def _check(source: Source, fpath: Path) -> Source:
    values = source.values
    if values.ndim != 2 or len(values) != len(source.labels) or not np.isfinite(values).all() or not values.shape[1]:
        raise DataError(
            f"{fpath} does not have one row of finite numbers per name: it has {len(source.labels):,} names and values "
            f"of shape {values.shape}"
        )
    return source


def _read_store(dpath: Path, name: str, dims: int) -> Source:
    """Return the co-expression of genes in the control cells of a store: loadings of a truncated SVD.

    It uses up to 20,000 control cells, with an equal share of every line. Genes are standardised within each line, so
    that differences between lines do not count as co-expression. Perturbed cells are never used.
    """
    store = open_store(dpath)
    runs = store.runs[store.runs["is_control"]]
    gram, cells = np.zeros((store.n_genes, store.n_genes)), 0
    lines = runs["cell_line"].unique()
    for line in lines:
        rows = np.concatenate(
            [np.arange(r.start, r.start + r.length) for r in runs[runs["cell_line"] == line].itertuples()]
        )
        rows = np.sort(np.random.default_rng(0).permutation(rows)[: max(2, _CONTROLS // len(lines))])
        store.check_rows(rows)
        x = store.X[rows].astype(np.float64)
        x -= x.mean(axis=0)
        spread = x.std(axis=0)
        x /= np.where(spread > 0, spread, 1.0)
        gram += x.T @ x
        cells += len(rows)
    if cells < 3:
        raise DataError(f"{dpath} has {cells} control cells, which is too few for co-expression")
    values, vectors = np.linalg.eigh(gram / cells)
    kept = np.argsort(-values)[: min(dims, store.n_genes)]
    loadings = vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0.0))
    table = store.gene_table
    labels = [s if isinstance(s, str) and s else str(g) for s, g in zip(table["symbol"], table["gene"], strict=True)]
    alive = np.flatnonzero(store.present & (np.diag(gram) > 0))
    return Source(name=name, kind="co-expression", labels=[labels[i] for i in alive], values=loadings[alive])
