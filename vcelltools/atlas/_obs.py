"""The obs table of a merged atlas, and the table of its genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vcelltools.genes.union import Union, UnionGenes
from vcelltools.io.frame import arrow_numbers, arrow_texts
from vcelltools.io.hdf5.table import EmptyTable
from vcelltools.io.table import Column
from vcelltools.runtime.memory import trim_heap

TABLE_COLUMNS = ("tissue", "tech_10x", "cell_prep", "disease", "perturbation", "cell_line")
_COUNTED = {
    "gene_count": ("gene_count", "gene_count_Unique"),
    "umi_count": ("umi_count", "umi_count_Unique", "tscp_count"),
}


def make_obs(
    union: Union, table: Mapping[str, Mapping[str, Any]], *, only: Sequence[str] | None = None
) -> tuple[EmptyTable, list[str]]:
    """Return (obs of the union, warnings).

    Parameters
    ----------
    table
        Values by experiment and column, for the columns of the source's table.
    only
        Columns of the files to copy; all by default.
    """
    survey, members = union.survey, union.members
    n = int(survey.starts[-1])
    names = np.empty(n, object)
    barcodes = np.empty(n, object)
    n_twice, differ = 0, dict.fromkeys(_COUNTED, 0)
    found: dict[str, list[tuple[int, Column]]] = {}
    for k, m in enumerate(members):
        a, b = int(survey.starts[k]), int(survey.starts[k + 1])
        with union.files.use(k) as here:
            ds = here.dataset
            index = ds.obs.index
            barcodes[a:b] = index
            n_twice += len(index) - len(set(index.tolist()))
            names[a:b] = [f"{m.name}:{x}" for x in index]
            for what, usual in _COUNTED.items():
                column = next((c for c in usual if c in ds.obs.columns), None)
                if column is not None:
                    differ[what] += _count_differences(ds.obs.column(column), getattr(survey, what)[a:b])
            for c in ds.obs.columns:
                if c not in ("experiment", "barcode", *_COUNTED) and (only is None or c in only):
                    found.setdefault(c, []).append((k, ds.obs.column(c)))
        union.files.close_one(k)
        trim_heap()  # HDF5 has read every text into a block of its own
    codes = np.repeat(np.arange(len(members), dtype=np.int32), np.diff(survey.starts))
    columns: dict[str, Any] = {
        "experiment": Column(
            name="experiment", codes=codes, categories=np.array([m.name for m in members], dtype=object)
        ),
        "barcode": barcodes,
        "gene_count": survey.gene_count.astype(np.int32),
        "umi_count": survey.umi_count,
    }
    for c, parts in found.items():
        columns[c] = _join_column(c, parts, survey.starts)
    for c in TABLE_COLUMNS:
        if c not in columns and any(c in row for row in table.values()):
            values = [table.get(m.name, {}).get(c) for m in members]
            columns[c] = _categorical(c, np.array([None if v is None else str(v) for v in values], object)[codes])
    warnings = [
        f"{k:,} cells have a {what} in their file that differs from their counts; the computed one was kept"
        for what, k in differ.items()
        if k
    ]
    obs = EmptyTable(names, where="the merged obs", extra=columns)
    if n_twice:
        warnings.append(f"{n_twice:,} barcodes occur twice within their experiment")
    return obs, warnings


def _count_differences(column: Column, counted: np.ndarray) -> int:
    if column.values is None or column.values.dtype.kind not in "iuf":
        return 0
    return int(np.count_nonzero(column.values.astype(np.float64) != counted))


def _categorical(name: str, values: np.ndarray) -> Column:
    levels = sorted({v for v in values.tolist() if v is not None})
    place: dict[str | None, int] = {v: i for i, v in enumerate(levels)} | {None: -1}
    codes = np.array([place[v] for v in values.tolist()], np.int32)
    return Column(name=name, codes=codes, categories=np.array(levels, dtype=object))


def _join_column(name: str, parts: list[tuple[int, Column]], starts: np.ndarray) -> np.ndarray | Column:
    """Join a column of several files: numbers stay numbers (NaN if a file lacks it), others become categorical."""
    n = int(starts[-1])
    n_here = sum(int(starts[k + 1] - starts[k]) for k, _ in parts)
    numbers = all(c.values is not None and c.values.dtype.kind in "iuf" and c.missing is None for _, c in parts)
    flags = all(c.values is not None and c.values.dtype.kind == "b" and c.missing is None for _, c in parts)
    if (numbers or flags) and (n_here == n or numbers):
        dtype = np.result_type(*(c.values.dtype for _, c in parts))  # type: ignore[union-attr]
        if n_here < n and dtype.kind != "f":
            dtype = np.dtype(np.float64)
        out = np.full(n, np.nan, dtype) if n_here < n else np.empty(n, dtype)
        for k, c in parts:
            out[starts[k] : starts[k + 1]] = c.values
        return out
    labels = np.full(n, None, object)
    for k, c in parts:
        labels[starts[k] : starts[k + 1]] = c.labels()
    return _categorical(name, labels)


def make_var(genes: UnionGenes) -> EmptyTable:
    """Return var of the union: ``gene_symbols``, by gene."""
    keys, symbols = (np.array(v[: genes.n_kept], dtype=object) for v in (genes.keys, genes.symbols))
    return EmptyTable(keys, where="the merged var", extra={"gene_symbols": symbols})


def make_gene_table(union: Union) -> Any:
    """Return the table of ``genes.parquet``, which lists the experiments that lack each gene."""
    import pyarrow as pa

    genes, members = union.genes, union.members
    n_kept = genes.n_kept
    absent: list[list[int]] = [[] for _ in range(n_kept)]
    for k in range(len(members)):
        lacking = np.ones(len(genes.keys), bool)
        lacking[genes.columns[k]] = False
        for g in np.flatnonzero(lacking[:n_kept]).tolist():
            absent[g].append(k)
    ends = np.cumsum([0, *map(len, absent)])
    absent_from = np.array([k for ks in absent for k in ks], np.int32)
    files = pa.DictionaryArray.from_arrays(arrow_numbers(absent_from), arrow_texts([m.name for m in members]))
    columns = {
        "gene": arrow_texts(genes.kept),
        "gene_symbols": arrow_texts([str(s) for s in genes.symbols[:n_kept]]),
        "n_experiments": arrow_numbers(genes.n_files[:n_kept]),
        "n_cells": arrow_numbers(genes.n_cells[:n_kept]),
        "absent_from": pa.ListArray.from_arrays(arrow_numbers(ends.astype(np.int32)), files),
    }
    return pa.Table.from_arrays(list(columns.values()), names=list(columns))
