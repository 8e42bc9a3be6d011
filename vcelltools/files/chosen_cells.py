"""Choose cells of a file by their labels, at random, or both; a table of cells with additional columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io import Column, Dataset, Table, open_dataset
from vcelltools.io.table import TableBase

if TYPE_CHECKING:
    from anndata import AnnData


def choose_rows(
    ds: Dataset,
    *,
    n: int | None,
    frac: float | None,
    per_group: int | None,
    by: str | None,
    seed: int,
    allowed_n: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, int] | None]:
    """Return the (m,) increasing positions of the chosen cells, and the number of cells per group if there is a column.

    ``allowed_n`` is a (n,) bool mask of the cells to choose from; with it, all of them are chosen by default.
    """
    given = [k for k, v in (("n", n), ("frac", frac), ("per_group", per_group)) if v is not None]
    if len(given) > 1 or (not given and allowed_n is None):
        raise UsageError(
            "the number of cells was not given",
            hint=f"give exactly one of {spell('n')}, {spell('frac')} and {spell('per_group')}, or "
            f"{spell('where')} or {spell('matching')}",
        )
    among = np.arange(ds.n_cells) if allowed_n is None else np.flatnonzero(allowed_n)
    if per_group is not None and by is None:
        raise UsageError("the obs column of the groups was not given", hint=f"set {spell('by')} to an obs column")
    if frac is not None and not 0 < frac <= 1:
        raise UsageError(f"the fraction of cells is {frac}, but must be above 0 and at most 1")
    if n is not None and not 1 <= n <= len(among):
        raise UsageError(
            f"{n:,} cells cannot be sampled from {len(among):,}", hint="sample at least 1 cell and at most all of them"
        )
    if per_group is not None and per_group < 1:
        raise UsageError(f"the number of cells per group is {per_group}, but must be at least 1")
    if seed < 0:
        raise UsageError(f"seed is {seed}, but must be a whole number of at least 0")
    labels = ["all cells"]
    codes = np.zeros(len(among), np.int64)
    if by is not None:
        found, labels = ds.obs.column(by).factorize()
        found = found[among]
        codes = np.where(found < 0, len(labels), found)
        if (found < 0).any():
            labels = [*labels, "no label"]
    size = np.bincount(codes, minlength=len(labels))
    if per_group is not None:
        take = np.minimum(size, per_group)
    elif not given:
        take = size
    else:
        total = n if n is not None else max(1, round(frac * len(among)))  # type: ignore[operator]
        take = _share_out(size, total)
    draw = np.random.Generator(np.random.Philox(key=[seed, 1])).random(ds.n_cells)[among]
    order = np.lexsort((draw, codes))  # group by group, in random order within each
    first = np.concatenate([[0], np.cumsum(size)])[:-1]
    rank = np.arange(len(among)) - np.repeat(first, size)
    rows = among[np.sort(order[rank < np.repeat(take, size)])]
    return rows, None if by is None else {
        k: int(v) for k, v in zip(labels, take, strict=True) if v or allowed_n is None
    }


def _share_out(size: np.ndarray, total: int) -> np.ndarray:
    """Divide ``total`` among groups in proportion to their sizes, by largest remainders."""
    exact = size * (total / size.sum())
    take = np.floor(exact).astype(np.int64)
    rest = np.argsort(take - exact, kind="stable")[: total - int(take.sum())]
    take[rest] += 1
    return take


# common names of the obs column of the cell line in data and predictions
LINE_COLUMNS = ("cell_line", "context", "cell_type", "celltype", "cellline", "cell_line_id", "line", "cell_name")


def find_allowed(
    ds: Dataset,
    where: Mapping[str, Sequence[str]],
    by: str | None,
    matching: str | os.PathLike | AnnData | None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Return (n,) bool: the cells that match ``where`` and ``matching``.

    A cell matches ``where`` if it has one of the labels in each of its columns, and ``matching`` if its label in the
    column ``by`` also occurs in that file, in the same cell line if both files distinguish lines. A label that no cell
    has is split at its commas.

    Raises
    ------
    DataError
        If no cell has a label, or no cell is left.
    """
    allowed = np.ones(ds.n_cells, bool)
    for column, given in where.items():
        codes, labels = ds.obs.column(column).factorize()
        wanted = [part for w in given for part in ([w] if w in labels else w.split(","))]
        unknown = [w for w in wanted if w not in labels]
        if unknown:
            more = ", …" if len(labels) > 10 else ""
            raise DataError(
                f"{ds.label}: no cell has obs/{column} = {unknown[0]!r}",
                hint=f"its labels: {', '.join(sorted(map(str, labels))[:10])}{more}",
            )
        allowed &= _has(codes, [label in set(wanted) for label in labels])
    if matching is not None:
        if by is None:
            raise UsageError(
                "the obs column to match was not given", hint=f"set {spell('by')} to an obs column of both files"
            )
        with open_dataset(matching, name="matching") as other:
            allowed &= _match(ds, other, by, allowed, [] if notes is None else notes)
            where = {**where, by: [f"those of {other.label}"]}
    if not allowed.any():
        said = ", ".join(f"{k} = {' or '.join(v)}" for k, v in where.items())
        raise DataError(f"{ds.label}: no cell has {said}")
    return allowed


def _match(ds: Dataset, other: Dataset, by: str, allowed_n: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return (n,) bool: the cells whose label in ``by`` occurs in the other file, in the same line."""
    codes, labels = ds.obs.column(by).factorize()
    found, theirs = other.obs.column(by).factorize()
    ours = {c: ds.obs.column(c).factorize() for c in LINE_COLUMNS if c in ds.obs.columns and c != by}
    lines = {c: other.obs.column(c).factorize() for c in LINE_COLUMNS if c in other.obs.columns and c != by}
    pairs = [(a, b) for a in ours for b in lines if lines[b][1] and set(lines[b][1]) <= set(ours[a][1])]
    if not pairs:
        for column, (line, names) in ours.items():
            there = [names[k] for k in np.unique(line[allowed_n & (line >= 0)])]
            if 1 < len(there) < 1_000:
                notes.append(
                    f"cells of {len(there)} labels of {column} are pooled ({', '.join(there[:3])}, …): {other.label} "
                    f"does not say which one to use; choose one with {spell('where')} {column}=LABEL"
                )
        return _has(codes, [label in set(theirs) for label in labels])
    column, their = max(pairs, key=lambda p: p[0] == p[1])
    (line, names), (line_m, names_m) = ours[column], lines[their]
    both = set(zip(found.tolist(), line_m.tolist(), strict=True))
    wanted = {(theirs[p], names_m[k]) for p, k in both if min(p, k) >= 0}
    table = np.zeros((len(labels) + 1, len(names) + 1), bool)  # the last entries are for cells without a label
    for i, label in enumerate(labels):
        for k, name in enumerate(names):
            table[i, k] = (label, name) in wanted
    notes.append(f"cells are matched in {by} and {column}" + ("" if column == their else f" ({their} there)"))
    return table[codes, line]


def _has(codes: np.ndarray, wanted: list[bool]) -> np.ndarray:
    return np.array([*wanted, False])[codes]  # the last entry is for cells without a label, whose code is -1


def parse_where(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse texts of the form ``COLUMN=A,B`` to column -> labels."""
    out: dict[str, list[str]] = {}
    for text in texts:
        column, equals, label = text.partition("=")
        if not column or not equals or not label or column in out:
            raise UsageError(
                f"{spell('where')} {text!r} is not a valid condition",
                hint="use COLUMN=LABEL or COLUMN=A,B, with each column at most once",
            )
        out[column] = [label]
    return out


class ExtendedTable(TableBase):
    """A table with further columns, or others in the place of its own."""

    def __init__(self, inner: Table, extra: Mapping[str, np.ndarray | Column]) -> None:
        self._inner, self._extra = inner, extra
        self.n, self.where = inner.n, "obs"

    @property
    def index(self) -> np.ndarray:
        """Row names."""
        return self._inner.index

    @property
    def columns(self) -> list[str]:
        """The inner columns, then the further ones."""
        return [*(c for c in self._inner.columns if c not in self._extra), *self._extra]

    def _load(self, name: str, rows: slice | None = None) -> Column:
        if name in self._extra:
            part, found = rows or slice(None), self._extra[name]
            if not isinstance(found, Column):
                return Column(name=name, values=found[part])
            values, codes = ((None if v is None else v[part]) for v in (found.values, found.codes))
            return replace(found, values=values, codes=codes)
        return self._inner.column(name) if rows is None else self._inner.read(name, rows.start, rows.stop)
