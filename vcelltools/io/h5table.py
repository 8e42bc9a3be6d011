"""obs and var inside an HDF5 file or zarr store, in every encoding that anndata and mudata have written."""

from __future__ import annotations

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


def read_values(file: File, key: str, *, length: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an array, string array or nullable array at ``key``: (values, missing or None)."""
    node = get_node(file, key)
    ratio = MAX_RATIO if length is None else COLUMN_RATIO
    if node is None:
        raise DataError(f"{file.filename}: {key} is missing")
    if is_group(node):
        if any(get_node(file, f"{key}/{k}") is None for k in _NULLABLE):
            kind = _attr_text(node.attrs.get("encoding-type", "a group"))
            raise DataError(f"{file.filename}: {key} is {kind}, which is not a column that can be read")
        parts = [need_dataset(file, f"{key}/{k}", what="a nullable column has values and mask") for k in _NULLABLE]
        values, mask = (read_small(file, p, length=length, ratio=ratio) for p in parts)
        if mask.shape != values.shape:
            raise DataError(f"{file.filename}: {key}: values and mask differ in length")
        missing = mask.astype(bool)
        if values.dtype.kind in "OSUT":
            values = to_text(values)
            values[missing] = None
            return values, None
        return values, missing if missing.any() else None
    values = read_small(file, node, length=length, ratio=ratio)
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
            self._index_key = _attr_text(group.attrs.get("_index", ""))
            if not self._index_key:
                self._index_key = next((k for k in _INDEX_KEYS if get_node(file, f"{key}/{k}") is not None), "_index")
            order = [_attr_text(c) for c in np.atleast_1d(group.attrs.get("column-order", []))]
            found = [k for k in group if k not in (self._index_key, "__categories")]
            self._columns = [c for c in order if c in found] + [k for k in found if k not in order]
        self._index: np.ndarray | None = None
        index_key = f"{key}/{self._index_key}"
        if get_node(file, index_key) is None:
            raise DataError(f"{file.filename}: {index_key} is missing: it names the rows of {key}")
        if (have := get_length(file, index_key)) != n:
            raise DataError(f"{self.where}/{self._index_key} has {have or 0:,} names; {n:,} expected from the matrix")

    @property
    def index(self) -> np.ndarray:
        """Row names, as str."""
        if self._index is None:
            values, _ = read_values(self._file, f"{self._key}/{self._index_key}", length=self.n)
            self._index = values if values.dtype == object else values.astype(str).astype(object)
        return self._index

    def forget(self) -> None:
        """Let go of the row names."""
        self._index = None

    @property
    def columns(self) -> list[str]:
        """Column names in the file's order."""
        return list(self._columns)

    def _load(self, name: str) -> Column:
        file, key = self._file, f"{self._key}/{name}"
        node = get_node(file, key)
        with reading(file.filename, key):
            if is_group(node) and get_node(file, f"{key}/codes") is not None:
                codes = read_small(
                    file, need_dataset(file, f"{key}/codes", what="the codes"), length=self.n, ratio=COLUMN_RATIO
                )
                cats, _ = read_values(file, f"{key}/categories")
                if codes.dtype.kind not in "iu":
                    raise DataError(f"{file.filename}: {key}/codes are not integers")
                ordered = bool(node.attrs.get("ordered", False))
                return Column(name=name, codes=codes.astype(np.int64), categories=cats, ordered=ordered)
            if (node is not None and not is_group(node)) and "categories" in node.attrs:  # anndata 0.7
                cats_key = f"{self._key}/__categories/{name}"
                cats_node = get_node(file, cats_key)
                if cats_node is not None:
                    cats, _ = read_values(file, cats_key)
                    codes = read_small(file, node, length=self.n, ratio=COLUMN_RATIO)
                    ordered = bool(cats_node.attrs.get("ordered", False))
                    return Column(name=name, codes=codes.astype(np.int64), categories=cats, ordered=ordered)
        values, missing = read_values(file, key, length=self.n)
        return Column(name=name, values=values, missing=missing)


class H5RecordTable(TableBase):
    """A compound dataset, as anndata ≤ 0.6 wrote obs and var (categories in ``uns/<column>_categories``)."""

    def __init__(self, file: File, key: str, n: int, uns_key: str = "uns") -> None:
        self._file, self._uns, self.n = file, uns_key, n
        self.where = f"{file.filename}: {key}"
        self._records = read_small(file, need_dataset(file, key, what="the table"), length=n)
        names = list(self._records.dtype.names or ())
        self._index_key = next((k for k in ("index", "_index") if k in names), names[0] if names else "")
        self._columns = [c for c in names if c != self._index_key]

    @property
    def index(self) -> np.ndarray:
        """Row names, as str."""
        return to_text(np.asarray(self._records[self._index_key]))

    @property
    def columns(self) -> list[str]:
        """Column names in the file's order."""
        return list(self._columns)

    def _load(self, name: str) -> Column:
        values = np.asarray(self._records[name])
        cats_key = f"{self._uns}/{name}_categories"
        if values.dtype.kind in "iu" and get_node(self._file, cats_key) is not None:
            cats, _ = read_values(self._file, cats_key)
            return Column(name=name, codes=values.astype(np.int64), categories=cats)
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

    def _load(self, name: str) -> Column:
        return Column(name=name, values=self._extra[name])


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

    def forget(self) -> None:
        """Let go of the row names."""
        self._inner.forget()
        self._outer.forget()

    @property
    def columns(self) -> list[str]:
        """The modality's columns, then the outer ones."""
        mine = self._inner.columns
        return mine + [c for c in self._outer.columns if c not in mine]

    def _load(self, name: str) -> Column:
        if name in self._inner.columns:
            return self._inner._load(name)
        c = self._outer.column(name)
        pick = self._rows
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
