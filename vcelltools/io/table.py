"""Read obs and var column by column, without pandas, in every encoding that anndata has written since 0.6."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vcelltools.errors import DataError
from vcelltools.names import fold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

_MISSING_TEXT = ("", "nan", "NaN", "<NA>")  # spellings of a missing label
_MAX_COMPARED = 100_000  # maximum number of labels in a column among which nearly equal ones are searched
RANGE = 1 << 16  # number of rows to hold at once while iterating over a table


def decode(text: bytes) -> str:
    """Return text decoded as UTF-8, or as Latin-1 (where every byte is a character) if it is not valid UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of obs or var.

    Attributes
    ----------
    name
        Name of the column.
    values
        (n,) numbers, booleans or an object array of str with None where missing; None for categoricals.
    codes
        (n,) integers into ``categories``, -1 where missing; None unless categorical.
    categories
        The categories, in the order of the file; None unless categorical.
    ordered
        Whether the categories are ordered.
    missing
        (n,) bool, True where a nullable number is missing, or None.
    notes
        The notes of the data set, which receive a note about every change to labels.
    """

    name: str
    values: np.ndarray | None = None
    codes: np.ndarray | None = None
    categories: np.ndarray | None = None
    ordered: bool = False
    missing: np.ndarray | None = None
    notes: list[str] | None = field(default=None, repr=False, compare=False)

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
        """Return (n,) bool: whether the value is missing."""
        if self.codes is not None:
            return self.codes < 0
        assert self.values is not None
        missing = np.zeros(len(self.values), bool) if self.missing is None else self.missing.copy()
        if self.values.dtype == object:
            missing |= np.array([v is None for v in self.values], bool)
        elif self.values.dtype.kind == "f":
            missing |= np.isnan(self.values)
        return missing

    def labels(self, *, exact: bool = False) -> np.ndarray:
        """Return (n,) object array of str, or None if missing; tidied (:func:`tidy`) unless ``exact``."""
        if self.codes is not None:
            assert self.categories is not None
            whole = is_text(self.categories)
            names = self.categories.tolist() if whole else [_label(c) for c in self.categories]
            table = np.array([*(names if exact else map(tidy, names)), None], dtype=object)
            return table[self.codes]
        assert self.values is not None
        names = [_label(v) for v in self.values]
        out = np.array(names if exact or self.values.dtype != object else [tidy(v) for v in names], dtype=object)
        if self.missing is not None:
            out[self.missing] = None
        return out

    def factorize(self) -> tuple[np.ndarray, list[str]]:
        """Return (codes, labels): int32 positions in the sorted list of the tidied labels present; -1 where missing.

        Labels sort as pandas sorts the values (numbers by size, strings by code point).
        """
        if self.codes is not None:
            assert self.categories is not None
            present = np.flatnonzero(np.bincount(self.codes[self.codes >= 0]))
            cats = self.categories[present]
            order = np.argsort(cats.astype(str) if cats.dtype == object else cats, kind="stable")
            lookup = np.full(len(self.categories) + 1, -1, np.int32)
            lookup[present[order]] = np.arange(len(present), dtype=np.int32)
            return tidy_levels(self.name, lookup[self.codes], [_label(c) or "" for c in cats[order]], self.notes)
        assert self.values is not None
        missing = self.get_missing()
        codes = np.full(len(self.values), -1, np.int32)
        keep = ~missing
        values = self.values[keep]
        levels, inverse = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
        codes[keep] = inverse.astype(np.int32)
        return tidy_levels(self.name, codes, [_label(v) or "" for v in levels], self.notes)


def tidy(label: str | None) -> str | None:
    """Return a label without surrounding spaces, or None if it is empty or spells a missing value."""
    text = label.strip() if label is not None else ""
    return None if text in _MISSING_TEXT else text


def tidy_levels(
    name: str, codes: np.ndarray, levels: list[str], notes: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return the codes and the sorted labels, with each label tidied; changes are added to ``notes``."""
    said = []
    clean = [tidy(v) for v in levels]
    if clean != levels:
        labels = sorted({v for v in clean if v is not None})
        place = {v: i for i, v in enumerate(labels)}
        codes = np.array([*(-1 if v is None else place[v] for v in clean), -1], np.int32)[codes]
        blank = [v for v, c in zip(levels, clean, strict=True) if c is not None and c != v]
        gone = [v for v, c in zip(levels, clean, strict=True) if c is None]
        if blank:
            said.append(f"{name}: spaces around {len(blank):,} labels were removed ({blank[0]!r}, …)")
        if gone:
            said.append(f"{name}: cells with the label {gone[0]!r} count as cells without a label")
        levels = labels
    alike: dict[str, list[str]] = {}
    for v in levels if len(levels) <= _MAX_COMPARED else ():
        alike.setdefault(fold(v), []).append(v)
    if pairs := [v for v in alike.values() if len(v) > 1]:
        same = " and ".join(map(repr, pairs[0][:3]))
        but = "differ only in case, separators or Unicode form and are kept separate"
        said.append(f"{name}: {len(pairs):,} labels {but}: {same}")
    if notes is not None:
        notes.extend(n for n in said if n not in notes)
    return codes, levels


def is_text(values: np.ndarray) -> bool:
    """Return whether an array of objects holds only str; this takes as long as joining them."""
    if values.dtype != object:
        return False
    try:
        "".join(values.tolist())
    except TypeError:
        return False
    return True


def _narrow(values: np.ndarray | None) -> np.ndarray | None:
    """Return long doubles, which neither pandas nor Arrow knows, as float64, and everything else unchanged."""
    if values is None or values.dtype.kind != "f" or values.dtype.itemsize <= 8:
        return values
    return values.astype(np.float64)


def _find_merged(categories: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (new code of each old one, kept categories) if categories repeat or are missing, which pandas rejects."""
    if is_text(categories) and len(set(categories.tolist())) == len(categories):
        return None
    first: dict[str | None, int] = {}
    labels = [_label(c) for c in categories]
    kept = [i for i, label in enumerate(labels) if label is not None and first.setdefault(label, i) == i]
    if len(kept) == len(labels):
        return None
    place = {labels[i]: k for k, i in enumerate(kept)}
    return np.array([*(place.get(label, -1) for label in labels), -1], np.int64), categories[kept]


def _label(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return decode(value)
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else (str(int(value)) if float(value).is_integer() else str(value))
    return str(value)


class Table(Protocol):
    """The obs or var of a data set; columns load on first use."""

    n: int
    where: str
    index_name: str | None
    notes: list[str] | None

    @property
    def index(self) -> np.ndarray:
        """(n,) object array of str: cell barcodes or gene names."""
        ...

    @property
    def columns(self) -> list[str]:
        """Column names in the order of the file."""
        ...

    def column(self, name: str) -> Column:
        """Return one column, or raise a :class:`DataError` that lists the columns if there is no such name."""
        ...

    def names(self, start: int, stop: int) -> np.ndarray:
        """Return the row names ``start:stop``, as in :attr:`index`."""
        ...

    def read(self, name: str, start: int, stop: int) -> Column:
        """Return the rows ``start:stop`` of one column, without reading the rest."""
        ...

    def ranges(self, name: str, step: int = RANGE) -> Iterator[tuple[int, Column]]:
        """Yield (first row, column) for consecutive ranges of rows."""
        ...

    def factorize(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return the result of :meth:`Column.factorize` for the whole column, while holding one range at a time."""
        ...

    def forget(self) -> None:
        """Free row names that can be read again."""
        ...

    def hash_stored(self, columns: Sequence[str]) -> str | None:
        """Return a hash of the row names and of some columns as they are stored, or None.

        Equal hashes mean equal values; different ones mean nothing.
        """
        ...

    def list_readable(self, notes: list[str]) -> list[str]:
        """Return the columns that can be read; problems of the others are added to ``notes``."""
        ...

    def to_frame(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return the table (or some columns) as a pandas DataFrame indexed by ``index``."""
        ...


class TableBase:
    """The common base of all tables: errors, and conversion to pandas."""

    where: str
    n: int
    index_name: str | None = None
    notes: list[str] | None = None

    @cached_property
    def _merged(self) -> dict[str, Any]:
        return {}

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

    def hash_stored(self, columns: Sequence[str]) -> str | None:
        """Return None: what is stored is not known."""
        return None

    def column(self, name: str) -> Column:
        """Return one column, after checking its length."""
        return self._get(name, None, self.n)

    def read(self, name: str, start: int, stop: int) -> Column:
        """Return the rows ``start:stop`` of one column, after checking their number."""
        return self._get(name, slice(start, stop), stop - start)

    def names(self, start: int, stop: int) -> np.ndarray:
        """Return the row names ``start:stop``."""
        return self.index[start:stop]

    def ranges(self, name: str, step: int = RANGE) -> Iterator[tuple[int, Column]]:
        """Yield (first row, column) for consecutive ranges of rows."""
        for a in range(0, self.n, step):
            yield a, self.read(name, a, min(a + step, self.n))

    def factorize(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return (codes, labels) as :meth:`Column.factorize` does, while holding one range of values at a time."""
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
        rank = np.full(len(found) + 1, -1, np.int32)  # the last entry is for code -1
        rank[[found[v] for v in values]] = np.arange(len(values), dtype=np.int32)
        levels = np.array(values, dtype=kind)
        for a in range(0, self.n, RANGE):
            codes[a : a + RANGE] = rank[codes[a : a + RANGE]]
        return tidy_levels(name, codes, [_label(v) or "" for v in levels], self.notes)

    def _has(self, name: str) -> bool:
        return name in self.columns

    def list_readable(self, notes: list[str]) -> list[str]:
        """Return the columns that can be read; problems of the others are added to ``notes``."""
        out = []
        for name in self.columns:
            try:
                self.read(name, 0, 0)
                out.append(name)
            except DataError as e:
                notes.append(f"{e.message}; the column was skipped")
        return out

    def _get(self, name: str, rows: slice | None, length: int) -> Column:
        if not self._has(name):
            have = ", ".join(self.columns[:30]) or "none"
            raise DataError(f"{self.where} has no column {name!r}", hint=f"columns: {have}")
        col = self._load(name, rows)
        if len(col) != length:
            raise DataError(f"{self.where}/{name} has {len(col):,} entries instead of {length:,}")
        for part in (col.values, col.categories):
            if part is not None and part.dtype.kind not in "biufOSUM":
                raise DataError(f"{self.where}/{name} holds {part.dtype} values, which is not supported for a column")
        col = replace(col, values=_narrow(col.values), categories=_narrow(col.categories))
        if col.codes is not None:
            assert col.categories is not None
            if len(col.codes) and (int(col.codes.max()) >= len(col.categories) or int(col.codes.min()) < -1):
                bad = int(np.flatnonzero((col.codes >= len(col.categories)) | (col.codes < -1))[0])
                row = bad + (0 if rows is None else rows.start)
                raise DataError(
                    f"{self.where}/{name}: category code {int(col.codes[bad])} at row {row} is out of range "
                    f"(there are {len(col.categories)} categories)"
                )
            known = self._merged.get(name)
            if known is None or known[0] is not col.categories:
                known = self._merged[name] = (col.categories, _find_merged(col.categories))
            if known[1] is not None:
                lookup, kept = known[1]
                col = replace(col, codes=lookup[col.codes].astype(col.codes.dtype), categories=kept)
        return col if self.notes is None else replace(col, notes=self.notes)

    def to_frame(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return a pandas DataFrame indexed by ``index``."""
        import pandas as pd

        out = {name: get_series(self.column(name)) for name in (self.columns if columns is None else columns)}
        frame = pd.DataFrame(out, index=pd.RangeIndex(self.n))
        return frame.set_index(pd.Index(self.index.astype(str)))

    def forget(self) -> None:
        """Free row names that can be read again: millions of them take hundreds of megabytes."""


def get_series(c: Column) -> pd.Series:
    """Return a column as a pandas Series with the default index."""
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
        self.index_name = None if frame.index.name is None else str(frame.index.name)
        self._columns: dict[str, int] = {}
        for i, c in enumerate(frame.columns):
            self._columns.setdefault(str(c), i)

    @property
    def index(self) -> np.ndarray:
        """Row names."""
        return np.asarray(self._frame.index.astype(str), dtype=object)

    @property
    def columns(self) -> list[str]:
        """Column names."""
        return list(self._columns)

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop``."""
        return np.asarray(self._frame.index[start:stop].astype(str), dtype=object)

    def _load(self, name: str, rows: slice | None = None) -> Column:
        import pandas as pd

        s = self._frame.iloc[:, self._columns[name]]
        if rows is not None:
            s = s.iloc[rows]
        if isinstance(s.dtype, pd.CategoricalDtype):
            return Column(
                name=name,
                codes=np.asarray(s.cat.codes),
                categories=np.asarray(s.cat.categories),
                ordered=bool(s.cat.ordered),
            )
        if isinstance(s.dtype, pd.api.extensions.ExtensionDtype) and pd.api.types.is_numeric_dtype(s.dtype):
            missing = np.asarray(s.isna())
            values = s.fillna(s.dtype.type(0)).to_numpy(getattr(s.dtype, "numpy_dtype", None))
            return Column(name=name, values=values, missing=missing)
        if s.dtype == object or not isinstance(s.dtype, np.dtype):
            return Column(name=name, values=np.array([_get_text(v) for v in s], dtype=object))
        return Column(name=name, values=np.asarray(s))


def _get_text(value: Any) -> str | None:
    """Return an entry of an object column as text, or None if it is missing."""
    import pandas as pd

    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return decode(value)
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)
