"""Read the names of genes from common tables, which are recognised by content and read without a network.

The tables are GTF and GFF3 annotations, the complete set of HGNC, NCBI's gene_info and gene2ensembl, features.tsv of
Cell Ranger, exports of BioMart, and plain tables with two columns. An approved symbol takes precedence over a retired
one, and a retired one over an alias. A name that belongs to several genes is ambiguous, and no gene is chosen for it.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vcelltools.errors import DataError
from vcelltools.genes.identity import is_ensembl, strip_version
from vcelltools.io.textfile import iterate_lines

_HINT = (
    "GTF, GFF3, HGNC's complete set, NCBI's gene_info or gene2ensembl, features.tsv of Cell Ranger, a BioMart export, "
    "or two columns separated by a tab: alias, symbol or id"
)
APPROVED, RETIRED, ALIAS = range(3)
_GTF = re.compile(r'(\w+) "([^"]*)"')
_BIOMART = {
    "gene stable id": "id", "ensembl gene id": "id", "ensembl_gene_id": "id", "gene stable id version": "id",
    "ensembl_gene_id_version": "id", "gene name": "symbol", "external_gene_name": "symbol", "hgnc symbol": "symbol",
    "hgnc_symbol": "symbol", "associated gene name": "symbol", "gene synonym": "alias",
    "external_synonym": "alias", "external_gene_source": "", "ncbi gene (formerly entrezgene) id": "other",
    "entrezgene_id": "other",
}  # fmt: skip

# (id or symbol of a gene, [(name, one of APPROVED, RETIRED and ALIAS), ...])
Record = tuple[str, list[tuple[str, int]]]


@dataclass(frozen=True, kw_only=True)
class GeneTable:
    """Names of genes.

    Attributes
    ----------
    kind
        Description of the kind of table.
    gene_of
        Name -> gene: its Ensembl id if the table has one, otherwise its symbol.
    symbol_of
        Gene -> its approved symbol.
    ambiguous
        Names of several genes, which are not used.
    """

    kind: str
    gene_of: dict[str, str]
    symbol_of: dict[str, str]
    ambiguous: frozenset[str] = field(default_factory=frozenset)

    def describe(self) -> str:
        """Return a one-line summary."""
        line = f"{self.kind}: {len(self.symbol_of):,} genes, {len(self.gene_of):,} names"
        return line + (f"; {len(self.ambiguous):,} names of several genes are not used" if self.ambiguous else "")


def read_gene_table(path: str | os.PathLike) -> GeneTable:
    """Read a table of genes, plain or gzipped; its content determines its kind.

    Raises
    ------
    DataError
        If the kind of table is not known, or no gene is named.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv") as f:
    ...     _ = f.write("ENSG00000141510\\tTP53\\tGene Expression\\n")
    ...     f.flush()
    ...     table = read_gene_table(f.name)
    >>> table.kind, table.gene_of
    ('features.tsv of Cell Ranger', {'TP53': 'ENSG00000141510'})
    """
    lines = iterate_lines(path, what="a table of genes", hint=_HINT)
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip() and (not line.startswith("#") or "\t" in line):
            break
    if not head or not head[-1].strip():
        raise DataError(f"{path}: is empty; a table of genes is expected", hint=_HINT)
    kind, read = _recognise(head[-1], Path(path))
    records = read(_chain(head[-1], lines))
    gene_of, symbol_of, ambiguous = _merge(records)
    if not gene_of and not symbol_of:
        raise DataError(f"{path}: was read as {kind} and names no gene", hint=_HINT)
    return GeneTable(kind=kind, gene_of=gene_of, symbol_of=symbol_of, ambiguous=frozenset(ambiguous))


def read_aliases(path: str | os.PathLike) -> dict[str, str]:
    """Read any table of genes as name -> gene (an Ensembl id, or a symbol); ambiguous names are dropped."""
    return read_gene_table(path).gene_of


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _merge(records: Iterable[Record]) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Return (name -> gene, gene -> symbol, ambiguous names); the best kind of name decides between genes."""
    best: dict[str, tuple[int, str]] = {}
    tied: set[str] = set()
    symbol_of: dict[str, str] = {}
    for gene, names in records:
        for name, rank in names:
            if rank == APPROVED:
                symbol_of.setdefault(gene, name)
            known = best.get(name)
            if name == gene or (known is not None and known[0] < rank):
                continue
            if known is None or rank < known[0]:
                best[name] = (rank, gene)
                tied.discard(name)
            elif known[1] != gene:
                tied.add(name)
    return {n: g for n, (_, g) in best.items() if n not in tied}, symbol_of, tied


def _recognise(line: str, path: Path) -> tuple[str, Callable[[Iterator[str]], Iterator[Record]]]:
    """Return the kind of a table, from its first line that is not a comment, and the function that reads it."""
    cells = [c.strip().strip('"').lstrip("#").lower() for c in re.split(r"[\t,]", line.rstrip("\r\n"))]
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) == 9 and columns[3].isdigit() and columns[4].isdigit() and columns[6] in "+-.?":
        return ("a GTF", _read_gtf) if 'gene_id "' in columns[8] else ("a GFF3", _read_gff)
    if "hgnc_id" in cells and "symbol" in cells:
        return "HGNC's complete set", _read_hgnc
    if {"geneid", "symbol", "dbxrefs"} <= set(cells):
        return "NCBI's gene_info", _read_gene_info
    if {"geneid", "ensembl_gene_identifier"} <= set(cells):
        return "NCBI's gene2ensembl", _read_gene2ensembl
    if any(_BIOMART.get(c) == "id" for c in cells) and len(cells) > 1:
        return "a BioMart export", _read_biomart
    if len(columns) >= 2 and is_ensembl(columns[0]) and not is_ensembl(columns[1]):
        return "features.tsv of Cell Ranger", lambda lines: _read_features(lines, path)
    return "a table of aliases", lambda lines: _read_pairs(lines, path)


def _read_gtf(lines: Iterator[str]) -> Iterator[Record]:
    seen: set[str] = set()
    for line in lines:
        if line.startswith("#") or "gene_id" not in line:
            continue
        said = dict(_GTF.findall(line.split("\t")[-1]))
        gene = strip_version(said.get("gene_id", ""))
        if gene and gene not in seen:
            seen.add(gene)
            name = said.get("gene_name") or said.get("gene")
            yield gene, [(name, APPROVED)] if name else []


def _read_gff(lines: Iterator[str]) -> Iterator[Record]:
    from urllib.parse import unquote

    for line in lines:
        columns = line.rstrip("\r\n").split("\t")
        if line.startswith("#") or len(columns) != 9 or "gene" not in columns[2].lower():
            continue
        said = dict(p.split("=", 1) for p in columns[8].split(";") if "=" in p)
        said = {k.strip(): unquote(v) for k, v in said.items()}
        crossed = [x.partition(":")[2] for x in said.get("Dbxref", "").split(",") if x.startswith("Ensembl:")]
        gene = said.get("gene_id") or (crossed or [said.get("ID", "").removeprefix("gene:")])[0]
        name = said.get("gene_name") or said.get("Name") or said.get("gene")
        aliases = [(a, ALIAS) for a in said.get("gene_synonym", said.get("Alias", "")).split(",") if a]
        if not is_ensembl(gene):
            gene = name or ""
        if gene:
            yield strip_version(gene), [*([(name, APPROVED)] if name else []), *aliases]


def _read_rows(lines: Iterator[str], delimiter: str = "\t") -> Iterator[dict[str, str]]:
    rows = csv.reader(lines, delimiter=delimiter)
    head = [c.strip().lstrip("#").lower() for c in next(rows)]
    for row in rows:
        yield dict(zip(head, row, strict=False))


def _read_hgnc(lines: Iterator[str]) -> Iterator[Record]:
    for row in _read_rows(lines):
        symbol, gene = row.get("symbol", ""), strip_version(row.get("ensembl_gene_id", ""))
        if symbol and row.get("status", "Approved") == "Approved":
            names = [(symbol, APPROVED)]
            names += [(v, RETIRED) for v in row.get("prev_symbol", "").split("|") if v]
            names += [(v, ALIAS) for v in row.get("alias_symbol", "").split("|") if v]
            yield gene or symbol, names


def _read_gene_info(lines: Iterator[str]) -> Iterator[Record]:
    for row in _read_rows(lines):
        symbol = row.get("symbol_from_nomenclature_authority", "-")
        symbol = row.get("symbol", "") if symbol in ("-", "") else symbol
        found = [x.removeprefix("Ensembl:") for x in row.get("dbxrefs", "").split("|") if x.startswith("Ensembl:")]
        if symbol and symbol != "NEWENTRY":
            names = [(symbol, APPROVED), (row["symbol"], APPROVED)]
            names += [(v, ALIAS) for v in row.get("synonyms", "-").split("|") if v not in ("", "-")]
            yield strip_version(found[0]) if len(found) == 1 else symbol, names


def _read_gene2ensembl(lines: Iterator[str]) -> Iterator[Record]:
    for row in _read_rows(lines):
        gene = strip_version(row.get("ensembl_gene_identifier", "-"))
        if is_ensembl(gene):
            yield gene, [(row["geneid"], ALIAS)]


def _read_biomart(lines: Iterator[str]) -> Iterator[Record]:
    first = next(lines)
    delimiter = "\t" if "\t" in first else ","
    for row in _read_rows(_chain(first, lines), delimiter):
        said: dict[str, list[str]] = {}
        for head, value in row.items():
            if (what := _BIOMART.get(head)) and value.strip():
                said.setdefault(what, []).append(value.strip())
        if gene := strip_version(next(iter(said.get("id", [])), "")):
            names = [(v, APPROVED) for v in said.get("symbol", [])[:1]]
            yield gene, names + [(v, ALIAS) for k in ("alias", "other") for v in said.get(k, [])]


def _read_features(lines: Iterator[str], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        columns = line.rstrip("\r\n").split("\t")
        if line.strip():
            if len(columns) < 2:
                raise DataError(f"{path}: line {number} has no column of symbols", hint=_HINT)
            if len(columns) < 3 or columns[2] in ("", "Gene Expression"):
                yield strip_version(columns[0]), [(columns[1], APPROVED)]


def _read_pairs(lines: Iterator[str], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [p.strip() for p in line.rstrip("\r\n").split("\t")]
        if len(parts) != 2 or not all(parts):
            raise DataError(f"{path}: line {number} is not two columns separated by a tab", hint=_HINT)
        yield strip_version(parts[1]), [(parts[0], ALIAS)]
