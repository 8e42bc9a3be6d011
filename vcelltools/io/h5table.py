"""obs and var inside an HDF5 file or zarr store, in every encoding that anndata and mudata have written."""

from __future__ import annotations

from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.safe import (
    COLUMN_RATIO,
    MAX_RATIO,
    File,
    get_length,
    get_node,
    is_group,
    need_dataset,
    read_small,
    reading,
)
from vcelltools.io.table import Column, TableBase

_INDEX_KEYS = ("_index", "index")
_NULLABLE = ("values", "mask")


def _attr_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def to_text(values: np.ndarray) -> np.ndarray:
    """Return strings as an object array of str, bytes decoded as UTF-8."""
    if values.dtype.kind == "S":
        return np.array([v.decode("utf-8", "replace") for v in values], dtype=object)
    if values.dtype == object:
        return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values], dtype=object)
    return values.astype(str).astype(object)


def _get_codes(codes: np.ndarray) -> np.ndarray:
    """Return codes of categories as int32, or as int64 where they might not fit."""
    fits = codes.dtype.itemsize < 4 or codes.dtype == np.int32
    return codes.astype(np.int32 if fits else np.int64, copy=False)


def read_values(
    file: File,
    key: str,
    *,
    length: int | None = None,
    rows: slice | None = None,
    checked: set[str] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an array, string array or nullable array (or some rows of it) at ``key``: (values, missing or None)."""
    node = get_node(file, key)
    ratio = MAX_RATIO if length is None else COLUMN_RATIO
    if node is None:
        raise DataError(f"{file.filename}: {key} is missing")
    if is_group(node):
        if any(get_node(file, f"{key}/{k}") is None for k in _NULLABLE):
            kind = _attr_text(node.attrs.get("encoding-type", "a group"))
            raise DataError(f"{file.filename}: {key} is {kind}, which is not a column that can be read")
        parts = [need_dataset(file, f"{key}/{k}", what="a nullable column has values and mask") for k in _NULLABLE]
        values, mask = (read_small(file, p, length=length, ratio=ratio, rows=rows, checked=checked) for p in parts)
        if mask.shape != values.shape:
            raise DataError(f"{file.filename}: {key}: values and mask differ in length")
        missing = mask.astype(bool)
        if values.dtype.kind in "OSUT":
            values = to_text(values)
            values[missing] = None
            return values, None
        return values, missing if missing.any() or rows is not None else None
    values = read_small(file, node, length=length, ratio=ratio, rows=rows, checked=checked)
    if values.ndim != 1:
        raise DataError(f"{file.filename}: {key} has {values.ndim} dimensions; 1 expected")
    return (to_text(values) if values.dtype.kind in "OSUT" else values), None


class H5Table(TableBase):
    """A data frame group written by anndata ≥ 0.7 (``_index`` and ``column-order`` attributes)."""

    def __init__(self, file: File, key: str, n: int) -> None:
        self._file, self._key, self.n = file, key, n
        self.where = f"{file.filename}: {key}"
        group = get_node(file, key)
        if not is_group(group):
            raise DataError(f"{self.where} is not a table")
        self._group = group
        with reading(file.filename, key):
            self._index_key = self._find_index_key()
            order = [_attr_text(c) for c in np.atleast_1d(group.attrs.get("column-order", []))]
            found = [k for k in group if k not in (self._index_key, "__categories")]
            self._columns = [c for c in order if c in found] + [k for k in found if k not in order]
        self._index: np.ndarray | None = None
        self._categories: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()
        index_key = f"{key}/{self._index_key}"
        if get_node(file, index_key) is None:
            raise DataError(
                f"{file.filename}: {index_key} is missing: it names the rows of {key}", hint=self._index_hint()
            )
        if (have := get_length(file, index_key)) != n:
            raise DataError(f"{self.where}/{self._index_key} has {have or 0:,} names; {n:,} expected from the matrix")

    def _find_index_key(self) -> str:
        """Return the name of the array of row names.

        Writers that set no ``_index`` attribute mean the usual array; one that is there and empty is damage, and
        what stands under the usual name may then be a mere column.
        """
        said = self._group.attrs.get("_index")
        if said is None:
            return self._find_usual_index() or _INDEX_KEYS[0]
        if not _attr_text(said):
            raise DataError(
                f"{self.where}: the attribute _index is empty; it names the array of row names",
                hint=self._index_hint(),
            )
        return _attr_text(said)

    def _find_usual_index(self) -> str | None:
        return next((k for k in _INDEX_KEYS if get_node(self._file, f"{self._key}/{k}") is not None), None)

    def _index_hint(self) -> str:
        there = self._find_usual_index()
        if there is None:
            return "the file is not a complete h5ad; write it again"
        return f"if {self._key}/{there} holds them, set the attribute _index of {self._key} to {there!r}"

    @property
    def index(self) -> np.ndarray:
        """Row names, as str."""
        if self._index is None:
            values, _ = read_values(self._file, f"{self._key}/{self._index_key}", length=self.n)
            self._index = values if values.dtype == object else values.astype(str).astype(object)
        return self._index

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop``, read for the occasion."""
        if self._index is not None:
            return self._index[start:stop]
        key = f"{self._key}/{self._index_key}"
        values, _ = read_values(self._file, key, length=self.n, rows=slice(start, stop), checked=self._checked)
        return values if values.dtype == object else values.astype(str).astype(object)

    def forget(self) -> None:
        """Let go of the row names and of categories."""
        self._index = None
        self._categories.clear()

    @property
    def columns(self) -> list[str]:
        """Column names in the file's order."""
        return list(self._columns)

    def _read_categories(self, key: str) -> np.ndarray:
        if key not in self._categories:
            self._categories[key] = read_values(self._file, key)[0]
        return self._categories[key]

    def _load(self, name: str, rows: slice | None = None) -> Column:
        file, key = self._file, f"{self._key}/{name}"
        node = get_node(file, key)
        whole: dict[str, Any] = {"length": self.n, "rows": rows}
        with reading(file.filename, key):
            if is_group(node) and get_node(file, f"{key}/codes") is not None:
                part = need_dataset(file, f"{key}/codes", what="the codes")
                codes = read_small(file, part, ratio=COLUMN_RATIO, **whole)
                cats = self._read_categories(f"{key}/categories")
                if codes.dtype.kind not in "iu":
                    raise DataError(f"{file.filename}: {key}/codes are not integers")
                ordered = bool(node.attrs.get("ordered", False))
                return Column(name=name, codes=_get_codes(codes), categories=cats, ordered=ordered)
            if (node is not None and not is_group(node)) and "categories" in node.attrs:  # anndata 0.7
                cats_key = f"{self._key}/__categories/{name}"
                cats_node = get_node(file, cats_key)
                if cats_node is not None:
                    cats = self._read_categories(cats_key)
                    codes = read_small(file, node, ratio=COLUMN_RATIO, **whole)
                    ordered = bool(cats_node.attrs.get("ordered", False))
                    return Column(name=name, codes=_get_codes(codes), categories=cats, ordered=ordered)
        values, missing = read_values(file, key, checked=self._checked, **whole)
        return Column(name=name, values=values, missing=missing)


class H5RecordTable(TableBase):
    """A compound dataset, as anndata ≤ 0.6 wrote obs and var (categories in ``uns/<column>_categories``)."""

    def __init__(self, file: File, key: str, n: int, uns_key: str = "uns") -> None:
        self._file, self._uns, self.n = file, uns_key, n
        self.where = f"{file.filename}: {key}"
        self._node = need_dataset(file, key, what="the table")
        self._last: tuple[slice, np.ndarray] | None = None
        names = list(self._read(slice(0, 0)).dtype.names or ())
        self._index_key = next((k for k in ("index", "_index") if k in names), names[0] if names else "")
        self._columns = [c for c in names if c != self._index_key]

    @property
    def index(self) -> np.ndarray:
        """Row names, as str."""
        return self.names(0, self.n)

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop``."""
        return to_text(np.asarray(self._read(slice(start, stop))[self._index_key]))

    def forget(self) -> None:
        """Let go of the records."""
        self._last = None

    def _read(self, rows: slice) -> np.ndarray:
        """Return some records; the last ones that were asked for are kept for their other columns."""
        if self._last is None or self._last[0] != rows:
            self._last = None
            self._last = (rows, read_small(self._file, self._node, length=self.n, rows=rows))
        return self._last[1]

    @property
    def columns(self) -> list[str]:
        """Column names in the file's order."""
        return list(self._columns)

    def _load(self, name: str, rows: slice | None = None) -> Column:
        values = np.asarray(self._read(rows or slice(0, self.n))[name])
        cats_key = f"{self._uns}/{name}_categories"
        if values.dtype.kind in "iu" and get_node(self._file, cats_key) is not None:
            cats, _ = read_values(self._file, cats_key)
            return Column(name=name, codes=_get_codes(values), categories=cats)
        return Column(name=name, values=to_text(values) if values.dtype.kind in "OSUT" else values)


class EmptyTable(TableBase):
    """A table with names alone."""

    def __init__(self, index: np.ndarray, *, where: str, extra: dict[str, np.ndarray] | None = None) -> None:
        self._index, self.n, self.where = index, len(index), where
        self._extra = extra or {}

    @property
    def index(self) -> np.ndarray:
        """Row names."""
        return self._index

    @property
    def columns(self) -> list[str]:
        """Column names."""
        return list(self._extra)

    def _load(self, name: str, rows: slice | None = None) -> Column:
        return Column(name=name, values=self._extra[name][rows or slice(None)])


class JoinedTable(TableBase):
    """A modality's obs, falling back on the MuData file's own obs for columns that it lacks.

    ``rows`` maps the modality's rows to the outer table's.
    """

    def __init__(self, inner: TableBase, outer: TableBase, rows: np.ndarray) -> None:
        self._inner, self._outer, self._rows = inner, outer, rows
        self.n, self.where = inner.n, inner.where

    @property
    def index(self) -> np.ndarray:
        """Row names of the modality."""
        return self._inner.index

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop`` of the modality."""
        return self._inner.names(start, stop)

    def forget(self) -> None:
        """Let go of the row names."""
        self._inner.forget()
        self._outer.forget()

    @property
    def columns(self) -> list[str]:
        """The modality's columns, then the outer ones."""
        mine = self._inner.columns
        return mine + [c for c in self._outer.columns if c not in mine]

    def _load(self, name: str, rows: slice | None = None) -> Column:
        if name in self._inner.columns:
            return self._inner._load(name, rows)
        pick = self._rows if rows is None else self._rows[rows]
        if rows is None or not len(pick):
            c = self._outer.column(name) if rows is None else self._outer.read(name, 0, 0)
        else:  # modalities keep the order of the file, so that their neighbours are neighbours there
            low = int(pick.min())
            c = self._outer.read(name, low, int(pick.max()) + 1)
            pick = pick - low
        return Column(
            name=name,
            values=None if c.values is None else c.values[pick],
            codes=None if c.codes is None else c.codes[pick],
            categories=c.categories,
            ordered=c.ordered,
            missing=None if c.missing is None else c.missing[pick],
        )


def open_table(file: File, key: str, n: int, *, uns_key: str = "uns") -> TableBase:
    """Return the table at ``key``, whatever its encoding.

    Raises
    ------
    DataError
        Where there is none.
    """
    node = get_node(file, key)
    if node is None:
        raise DataError(
            f"{file.filename}: {key} is missing: without it the {'genes' if 'var' in key else 'cells'} have no names",
            hint="the file is not a complete h5ad; write it again",
        )
    if not is_group(node):
        return H5RecordTable(file, key, n, uns_key)
    return H5Table(file, key, n)
