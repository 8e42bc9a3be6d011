"""obs and var, column by column, without pandas: every encoding that anndata has written since 0.6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vcelltools.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

RANGE = 1 << 16  # rows of a table that are held at once by what goes through all of them


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of obs or var.

    Attributes
    ----------
    name
        The column's name.
    values
        (n,) numbers, booleans or an object array of str with None where missing; None for categoricals.
    codes
        (n,) integers into ``categories``, -1 where missing; None unless categorical.
    categories
        The categories, in the file's order; None unless categorical.
    ordered
        Whether the categories are ordered.
    missing
        (n,) bool, True where a nullable number is missing, or None.
    """

    name: str
    values: np.ndarray | None = None
    codes: np.ndarray | None = None
    categories: np.ndarray | None = None
    ordered: bool = False
    missing: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """``categorical``, ``string``, ``bool`` or ``number``."""
        if self.codes is not None:
            return "categorical"
        assert self.values is not None
        return {"O": "string", "b": "bool"}.get(self.values.dtype.kind, "number")

    def __len__(self) -> int:
        return len(self.codes if self.codes is not None else self.values)  # type: ignore[arg-type]

    def get_missing(self) -> np.ndarray:
        """Return (n,) bool: where there is no value."""
        if self.codes is not None:
            return self.codes < 0
        assert self.values is not None
        missing = np.zeros(len(self.values), bool) if self.missing is None else self.missing.copy()
        if self.values.dtype == object:
            missing |= np.array([v is None for v in self.values], bool)
        elif self.values.dtype.kind == "f":
            missing |= np.isnan(self.values)
        return missing

    def labels(self) -> np.ndarray:
        """Return (n,) object array of str, None where missing."""
        if self.codes is not None:
            assert self.categories is not None
            table = np.array([*(_label(c) for c in self.categories), None], dtype=object)
            return table[self.codes]
        assert self.values is not None
        out = np.array([_label(v) for v in self.values], dtype=object)
        if self.missing is not None:
            out[self.missing] = None
        return out

    def factorize(self) -> tuple[np.ndarray, list[str]]:
        """Return (codes, labels): int32 positions in the sorted list of the labels present; -1 where missing.

        Labels sort as pandas sorts the values (numbers by size, strings by code point).
        """
        if self.codes is not None:
            assert self.categories is not None
            present = np.flatnonzero(np.bincount(self.codes[self.codes >= 0]))
            cats = self.categories[present]
            order = np.argsort(cats.astype(str) if cats.dtype == object else cats, kind="stable")
            lookup = np.full(len(self.categories) + 1, -1, np.int32)
            lookup[present[order]] = np.arange(len(present), dtype=np.int32)
            return lookup[self.codes], [_label(c) or "" for c in cats[order]]
        assert self.values is not None
        missing = self.get_missing()
        codes = np.full(len(self.values), -1, np.int32)
        keep = ~missing
        values = self.values[keep]
        levels, inverse = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
        codes[keep] = inverse.astype(np.int32)
        return codes, [_label(v) or "" for v in levels]


def _label(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else (str(int(value)) if float(value).is_integer() else str(value))
    return str(value)


class Table(Protocol):
    """obs or var of a data set; columns load when they are asked for."""

    n: int

    @property
    def index(self) -> np.ndarray:
        """(n,) object array of str: cell barcodes or gene names."""
        ...

    @property
    def columns(self) -> list[str]:
        """Column names in the file's order."""
        ...

    def column(self, name: str) -> Column:
        """Return one column; a :class:`DataError` lists the columns where there is no such name."""
        ...

    def names(self, start: int, stop: int) -> np.ndarray:
        """Return the row names ``start:stop``, as :attr:`index` has them."""
        ...

    def read(self, name: str, start: int, stop: int) -> Column:
        """Return the rows ``start:stop`` of one column; the rest is not read."""
        ...

    def ranges(self, name: str, step: int = RANGE) -> Iterator[tuple[int, Column]]:
        """Yield (first row, column) of one range of rows after the other."""
        ...

    def factorize(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return what :meth:`Column.factorize` of the whole column returns, holding a range of it at a time."""
        ...

    def to_frame(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return the table (or some columns) as a pandas DataFrame indexed by ``index``."""
        ...


class TableBase:
    """The shared half of every table: errors, and pandas."""

    where: str
    n: int

    @property
    def index(self) -> np.ndarray:  # pragma: no cover  overridden
        """Row names."""
        raise NotImplementedError

    @property
    def columns(self) -> list[str]:  # pragma: no cover  overridden
        """Column names."""
        raise NotImplementedError

    def _load(self, name: str, rows: slice | None = None) -> Column:  # pragma: no cover  overridden
        raise NotImplementedError

    def column(self, name: str) -> Column:
        """Return one column, checked to be as long as the table."""
        return self._get(name, None, self.n)

    def read(self, name: str, start: int, stop: int) -> Column:
        """Return the rows ``start:stop`` of one column, checked."""
        return self._get(name, slice(start, stop), stop - start)

    def names(self, start: int, stop: int) -> np.ndarray:
        """Return the row names ``start:stop``."""
        return self.index[start:stop]

    def ranges(self, name: str, step: int = RANGE) -> Iterator[tuple[int, Column]]:
        """Yield (first row, column) of one range of rows after the other."""
        for a in range(0, self.n, step):
            yield a, self.read(name, a, min(a + step, self.n))

    def factorize(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return (codes, labels) as :meth:`Column.factorize` does; no more than a range of values is held."""
        if self.read(name, 0, 0).codes is not None:
            return self.column(name).factorize()
        codes = np.full(self.n, -1, np.int32)
        found: dict[Any, int] = {}
        kind = np.dtype(object)
        for a, col in self.ranges(name):
            assert col.values is not None
            kind = col.values.dtype
            missing = col.get_missing()
            part = codes[a : a + len(col)]
            if kind.kind == "O":
                for i in np.flatnonzero(~missing).tolist():
                    part[i] = found.setdefault(col.values[i], len(found))
                continue
            levels, inverse = np.unique(col.values[~missing], return_inverse=True)
            at = np.array([found.setdefault(v, len(found)) for v in levels.tolist()], np.int32)
            part[~missing] = at[inverse]
        values = sorted(found)
        rank = np.full(len(found) + 1, -1, np.int32)  # the last is that of -1
        rank[[found[v] for v in values]] = np.arange(len(values), dtype=np.int32)
        levels = np.array(values, dtype=kind)
        for a in range(0, self.n, RANGE):
            codes[a : a + RANGE] = rank[codes[a : a + RANGE]]
        return codes, [_label(v) or "" for v in levels]

    def _get(self, name: str, rows: slice | None, length: int) -> Column:
        if name not in self.columns:
            have = ", ".join(self.columns[:30]) or "none"
            raise DataError(f"{self.where} has no column {name!r}", hint=f"columns: {have}")
        col = self._load(name, rows)
        if len(col) != length:
            raise DataError(f"{self.where}/{name} has {len(col):,} entries; {length:,} expected")
        if col.codes is not None:
            assert col.categories is not None
            if len(col.codes) and (int(col.codes.max()) >= len(col.categories) or int(col.codes.min()) < -1):
                bad = int(np.flatnonzero((col.codes >= len(col.categories)) | (col.codes < -1))[0])
                row = bad + (0 if rows is None else rows.start)
                raise DataError(
                    f"{self.where}/{name}: category code {int(col.codes[bad])} at row {row} is out of range "
                    f"(there are {len(col.categories)} categories)"
                )
        return col

    def to_frame(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return a pandas DataFrame indexed by ``index``."""
        import pandas as pd

        out = {name: get_series(self.column(name)) for name in (self.columns if columns is None else columns)}
        frame = pd.DataFrame(out, index=pd.RangeIndex(self.n))
        return frame.set_index(pd.Index(self.index.astype(str)))

    def forget(self) -> None:
        """Let go of row names that can be read again: millions of them are hundreds of megabytes."""


def get_series(c: Column) -> pd.Series:
    """Return a column as a pandas Series without an index of its own."""
    import pandas as pd

    if c.codes is not None:
        assert c.categories is not None
        return pd.Series(pd.Categorical.from_codes(c.codes, categories=list(c.categories), ordered=c.ordered))  # type: ignore[arg-type]
    assert c.values is not None
    if c.missing is not None:
        kind, bits = c.values.dtype.kind, 8 * c.values.dtype.itemsize
        if kind in "biuf":
            dtype = "boolean" if kind == "b" else f"{ {'i': 'Int', 'u': 'UInt', 'f': 'Float'}[kind] }{bits}"
            values = pd.array(c.values, dtype=dtype)  # type: ignore[call-overload]
            values[c.missing] = pd.NA
            return pd.Series(values)
    return pd.Series(c.values)


class MemoryTable(TableBase):
    """A table over a pandas DataFrame (an AnnData's obs or var)."""

    def __init__(self, frame: pd.DataFrame, *, where: str) -> None:
        self._frame = frame
        self.where = where
        self.n = len(frame)

    @property
    def index(self) -> np.ndarray:
        """Row names."""
        return np.asarray(self._frame.index.astype(str), dtype=object)

    @property
    def columns(self) -> list[str]:
        """Column names."""
        return [str(c) for c in self._frame.columns]

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop``."""
        return np.asarray(self._frame.index[start:stop].astype(str), dtype=object)

    def _load(self, name: str, rows: slice | None = None) -> Column:
        import pandas as pd

        s = self._frame[name]
        if rows is not None:
            s = s.iloc[rows]
        if isinstance(s.dtype, pd.CategoricalDtype):
            return Column(
                name=name,
                codes=np.asarray(s.cat.codes),
                categories=np.asarray(s.cat.categories),
                ordered=bool(s.cat.ordered),
            )
        if s.dtype == object or isinstance(s.dtype, pd.StringDtype):
            values = np.array([None if pd.isna(v) else str(v) for v in s], dtype=object)
            return Column(name=name, values=values)
        if not isinstance(s.dtype, np.dtype):
            missing = np.asarray(s.isna())
            return Column(name=name, values=np.asarray(s.fillna(s.dtype.type(0))), missing=missing)
        return Column(name=name, values=np.asarray(s))
