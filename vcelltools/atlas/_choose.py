"""Choose experiments by filters, caps, a seeded order and a target."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.atlas._sources import Source
from vcelltools.errors import DataError, UsageError, checked, spell

if TYPE_CHECKING:
    import pandas as pd

_WHERE = re.compile(r"^\s*(.+?)\s*(!=|>=|<=|=|~|>|<)\s*(.*?)\s*$", re.S)
# values that stand for missing entries in the public tables
UNKNOWN = {"", "unsure", "unknown", "not applicable", "not specified", "none", "n/a", "na", "nan"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The requested choice of experiments.

    Attributes
    ----------
    where
        Conditions ``COLUMN OP VALUE``, all of which must hold.
    cap
        ``COLUMN=K``: at most K experiments per value.
    seed
        Random seed of the order of the experiments.
    cells, experiments, ids, all
        The target, exactly one of: a number of cells (of whole experiments), a number of experiments, ids, or all.
    """

    where: tuple[str, ...] = ()
    cap: tuple[str, ...] = ()
    seed: int = 42
    cells: int | None = None
    experiments: int | None = None
    ids: tuple[str, ...] | None = None
    all: bool = False

    def __post_init__(self) -> None:
        given = [self.cells is not None, self.experiments is not None, self.ids is not None, self.all]
        if sum(given) != 1:
            raise UsageError(
                "no target is given" if not any(given) else "several targets are given",
                hint=f"give one of {spell('cells')}, {spell('experiments')}, {spell('ids')} and {spell('all')}",
            )
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed is {self.seed}", hint="use a whole number from 0 to 4294967295")

    def to_json(self) -> dict[str, Any]:
        """Return the values for a manifest."""
        target = {"cells": self.cells, "experiments": self.experiments, "all": self.all or None}
        ids = None if self.ids is None else list(self.ids)
        return {"where": list(self.where), "cap": list(self.cap), "seed": self.seed, **target, "ids": ids}


def is_unknown(value: Any) -> bool:
    """Return whether an entry of a table is missing: empty, None, ``unsure``, ``not applicable`` …"""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower().replace("_", " ") in UNKNOWN


def get_texts(value: Any) -> list[str]:
    """Return the texts of an entry (several for a list of terms, none if it is empty)."""
    if isinstance(value, list | tuple | np.ndarray):
        return [str(v) for v in value]
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    if isinstance(value, float) and value.is_integer():
        return [str(int(value))]
    return [str(value)]


def _find_column(source: Source, name: str) -> pd.Series:
    if name not in source.table.columns:
        near = difflib.get_close_matches(name, source.table.columns, 1, 0.5)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{source.name} has no column {name!r}", hint=f"{guess}columns: {', '.join(source.table.columns)}"
        )
    return source.table[name]


def _to_number(text: str, of: str) -> float:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        raise UsageError(f"{spell('where', of)}: {text!r} is not a number") from None


def _make_test(condition: str) -> tuple[str, Callable[[Any], bool]]:
    """Return (column, test) of a condition."""
    m = _WHERE.match(condition)
    if not m:
        raise UsageError(
            f"{spell('where', condition)} is not a valid condition", hint="use COLUMN OP VALUE with = != ~ > >= < or <="
        )
    column, op, value = m.groups()
    if op in ("=", "!="):
        options = [x.strip() for x in value.split("|")]

        def same(entry: Any) -> bool:
            if any(t in options for t in get_texts(entry)):
                return True
            return "" in options and (is_unknown(entry) or not get_texts(entry))

        return column, same if op == "=" else lambda entry: not same(entry)
    if op == "~":
        try:
            pattern = re.compile(value, re.I)
        except re.error as e:
            raise UsageError(f"{spell('where', condition)}: {value!r} is not a regular expression ({e})") from None
        return column, lambda entry: any(pattern.search(t) for t in get_texts(entry))
    limit = _to_number(value, condition)
    compare: dict[str, Callable[[float], bool]] = {
        ">": lambda x: x > limit, ">=": lambda x: x >= limit, "<": lambda x: x < limit, "<=": lambda x: x <= limit,
    }  # fmt: skip

    def test(entry: Any) -> bool:
        try:
            return compare[op](float(entry))
        except (TypeError, ValueError):
            return False

    return column, test


def filter_rows(source: Source, where: Sequence[str]) -> np.ndarray:
    """Return the positions of the experiments for which all conditions hold, in the order of the table.

    Raises
    ------
    DataError
        If a column does not exist, or no experiment is left; the message then lists the values of the column.
    UsageError
        If a condition is not valid.
    """
    keep = np.ones(len(source), bool)
    for condition in where:
        column, test = _make_test(condition)
        keep &= np.fromiter((test(v) for v in _find_column(source, column)), bool, len(source))
        if not keep.any():
            counts = count_values(source, column)
            wanted = _WHERE.match(condition).group(3)  # type: ignore[union-attr]
            near = difflib.get_close_matches(wanted, [str(v) for v, *_ in counts], 1, 0.6)
            guess = f"did you mean {near[0]!r}? " if near else ""
            census = ", ".join(f"{v} {n:,}" for v, n, _ in counts[:12])
            raise DataError(
                f"{source.name}: no experiment matches {spell('where', condition)}",
                hint=f"{guess}{column}: {census}",
            )
    return np.flatnonzero(keep)


def count_values(source: Source, column: str, rows: np.ndarray | None = None) -> list[tuple[str, int, float]]:
    """Return (value, experiments, cells) of a column, most frequent first; NaN if the numbers of cells are unknown."""
    rows = np.arange(len(source)) if rows is None else rows
    entries = _find_column(source, column).to_numpy(dtype=object)
    n: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    for i in rows.tolist():
        for text in get_texts(entries[i]) or ["(missing)"]:
            n[text] += 1
            cells[text] += source.cells[i]
    return sorted(((v, k, float(cells[v])) for v, k in n.items()), key=lambda x: (-x[1], x[0]))


def choose(source: Source, choice: Choice) -> np.ndarray:
    """Return the positions of the chosen experiments, in the order in which they are taken.

    The order is ``numpy.random.RandomState(seed).permutation`` over the filtered rows, which equals that of pandas'
    ``sample(frac=1, random_state=seed)``.

    Raises
    ------
    DataError, UsageError
        As in :func:`filter_rows`; also if the source lacks an id, or the target is cells but the table has no numbers.
    """
    rows = filter_rows(source, choice.where)
    if choice.ids is not None:
        return _pick_ids(source, rows, choice.ids)
    rows = rows[np.random.RandomState(choice.seed).permutation(len(rows))]
    rows = _apply_caps(source, rows, choice.cap)
    if choice.experiments is not None:
        return rows[: choice.experiments]
    if choice.cells is None:
        return rows
    cells = source.cells[rows]
    if np.isnan(cells).any():
        raise UsageError(
            f"{source.name} does not list the number of cells of its experiments", hint=f"give {spell('experiments')}"
        )
    before = np.concatenate([[0.0], np.cumsum(cells)[:-1]])
    return rows[before < choice.cells]


def _pick_ids(source: Source, rows: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    at = {source.ids[i]: i for i in rows.tolist()}
    for x in ids:
        if x not in at:
            why = f"is excluded by {spell('where')}" if x in source.ids else "does not exist"
            near = difflib.get_close_matches(x, at, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else "list the available ones with vcelltools atlas list"
            raise DataError(f"{source.name}: the experiment {x!r} {why}", hint=hint)
    return np.array([at[x] for x in dict.fromkeys(ids)], np.int64)


def _apply_caps(source: Source, rows: np.ndarray, caps: Sequence[str]) -> np.ndarray:
    for cap in caps:
        column, _, number = cap.rpartition("=")
        if not column or not number.isdigit() or int(number) < 1:
            raise UsageError(
                f"{spell('cap', cap)} is not a valid limit", hint="use COLUMN=K with a whole number of at least 1"
            )
        entries = _find_column(source, column).to_numpy(dtype=object)
        seen: Counter[tuple[str, ...]] = Counter()
        keep = []
        for i in rows.tolist():
            value = tuple(get_texts(entries[i]))
            if seen[value] < int(number):
                keep.append(i)
                seen[value] += 1
        rows = np.array(keep, np.int64)
    return rows


@checked
def read_ids(text: str) -> tuple[str, ...]:
    """Return the ids of ``A,B,C``, or of a file with one per line."""
    if "," not in text and Path(text).is_file():
        from vcelltools.io.textfile import read_text
        from vcelltools.names import read_lines

        ids = tuple(read_lines(read_text(text, what="a list of experiments, one per line,")))
    else:
        ids = tuple(x.strip() for x in text.split(",") if x.strip())
    if not ids:
        raise UsageError(f"{spell('ids', text)} names no experiment")
    return ids


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The content of a source.

    Attributes
    ----------
    source
        Name of the source.
    experiments, cells
        Numbers of experiments and cells after filtering; cells is None if the table does not list them.
    columns
        (name, distinct values, experiments without a known value) of each column.
    values
        (value, experiments, cells) of one column, if it was requested.
    """

    source: str
    experiments: int
    cells: int | None
    columns: list[tuple[str, int, int]]
    values: list[tuple[str, int, int | None]] | None = None
    settings: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        out: dict[str, Any] = {"source": self.source, **self.settings}
        out |= {"experiments": self.experiments, "cells": self.cells}
        out["columns"] = [{"name": n, "values": k, "unknown": u} for n, k, u in self.columns]
        if self.values is not None:
            out["values"] = [{"value": v, "experiments": n, "cells": c} for v, n, c in self.values]
        return out


@checked
def list_experiments(source: Source, *, where: Sequence[str] = (), values: str | None = None) -> Listing:
    """Count the experiments and cells of a source, column by column.

    Parameters
    ----------
    where
        Conditions as in :class:`Choice`.
    values
        Column whose values are also counted.
    """
    rows = filter_rows(source, where)
    cells = source.cells[rows]
    columns = []
    for name in source.table.columns:
        entries = source.table[name].to_numpy(dtype=object)[rows]
        distinct = {tuple(get_texts(v)) for v in entries}
        columns.append((name, len(distinct), sum(is_unknown(v) for v in entries if not isinstance(v, list))))
    counted = None
    if values is not None:
        counted = [(v, n, None if np.isnan(c) else int(c)) for v, n, c in count_values(source, values, rows)]
    return Listing(
        source=source.name,
        settings=source.settings,
        experiments=len(rows),
        cells=None if np.isnan(cells).any() else int(cells.sum()),
        columns=columns,
        values=counted,
    )
