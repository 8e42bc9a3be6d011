"""obs and var, column by column, without pandas: every encoding that anndata has written since 0.6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vcelltools.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


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
            present = np.unique(self.codes[self.codes >= 0])
            cats = self.categories[present]
            order = np.argsort(cats.astype(str) if cats.dtype == object else cats, kind="stable")
            lookup = np.full(len(self.categories) + 1, -1, np.int32)
            lookup[present[order]] = np.arange(len(present), dtype=np.int32)
            return lookup[self.codes], [_label(c) or "" for c in cats[order]]
        assert self.values is not None
        missing = np.zeros(len(self.values), bool) if self.missing is None else self.missing.copy()
        if self.values.dtype == object:
            missing |= np.array([v is None for v in self.values], bool)
        elif self.values.dtype.kind == "f":
            missing |= np.isnan(self.values)
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

    def _load(self, name: str) -> Column:  # pragma: no cover  overridden
        raise NotImplementedError

    def column(self, name: str) -> Column:
        """Return one column, checked to be as long as the table."""
        if name not in self.columns:
            have = ", ".join(self.columns[:30]) or "none"
            raise DataError(f"{self.where} has no column {name!r}", hint=f"columns: {have}")
        col = self._load(name)
        if len(col) != self.n:
            raise DataError(f"{self.where}/{name} has {len(col):,} entries; {self.n:,} expected")
        if col.codes is not None:
            assert col.categories is not None
            if len(col.codes) and (int(col.codes.max()) >= len(col.categories) or int(col.codes.min()) < -1):
                bad = int(np.flatnonzero((col.codes >= len(col.categories)) | (col.codes < -1))[0])
                raise DataError(
                    f"{self.where}/{name}: category code {int(col.codes[bad])} at row {bad} is out of range "
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
        values = c.values.astype(object)
        values[c.missing] = None
        return pd.Series(pd.array(values, dtype="boolean" if c.values.dtype.kind == "b" else None))  # type: ignore[call-overload]
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

    def _load(self, name: str) -> Column:
        import pandas as pd

        s = self._frame[name]
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
