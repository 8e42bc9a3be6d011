"""Read obs and var from an HDF5 file or zarr store, in every encoding that anndata and mudata have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.limits import COLUMN_RATIO, MAX_RATIO, reading
from vcelltools.io.hdf5.safe import File, Node, check_objects, get_length, get_node, is_group, need_dataset, read_small
from vcelltools.io.table import Column, Table, TableBase, decode, is_text

_INDEX_KEYS = ("_index", "index")
_NULLABLE = ("values", "mask")


def _attr_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def to_text(values: np.ndarray) -> np.ndarray:
    """Return strings as an object array of str, bytes decoded as UTF-8."""
    if is_text(values):
        return values
    if values.dtype.kind in "SO":
        return np.array([decode(v) if isinstance(v, bytes) else v for v in values], dtype=object)
    return values.astype(str).astype(object)


def _get_codes(codes: np.ndarray) -> np.ndarray:
    """Return category codes as int32, or as int64 if they might not fit."""
    fits = codes.dtype.itemsize < 4 or codes.dtype == np.int32
    return codes.astype(np.int32 if fits else np.int64, copy=False)


def read_values(
    file: File,
    key: str,
    *,
    length: int | None = None,
    rows: slice | None = None,
    checked: set[str] | None = None,
    node: Node = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an array, string array or nullable array (or some rows of it) at ``key``: (values, missing or None)."""
    node = get_node(file, key) if node is None else node
    ratio = MAX_RATIO if length is None else COLUMN_RATIO
    if node is None:
        raise DataError(f"{file.filename}: {key} is missing")
    if is_group(node):
        if any(get_node(file, f"{key}/{k}") is None for k in _NULLABLE):
            kind = _attr_text(node.attrs.get("encoding-type", "a group"))
            raise DataError(f"{file.filename}: {key} is {kind}, which is not supported for a column")
        parts = [need_dataset(file, f"{key}/{k}", what="a nullable column has values and a mask") for k in _NULLABLE]
        values, mask = (read_small(file, p, length=length, ratio=ratio, rows=rows, checked=checked) for p in parts)
        if mask.shape != values.shape:
            raise DataError(f"{file.filename}: the values and the mask of {key} differ in length")
        missing = mask.astype(bool)
        if values.dtype.kind in "OSUT":
            values = to_text(values)
            values[missing] = None
            return values, None
        return values, missing if missing.any() or rows is not None else None
    values = read_small(file, node, length=length, ratio=ratio, rows=rows, checked=checked)
    if values.ndim != 1:
        raise DataError(f"{file.filename}: {key} has {values.ndim} dimensions instead of 1")
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
            self._columns = self._find_columns()
        self.index_name = None if self._index_key == "_index" else self._index_key
        self._index: np.ndarray | None = None
        self._categories: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()
        index_key = f"{key}/{self._index_key}"
        if get_node(file, index_key) is None:
            raise DataError(
                f"{file.filename}: {index_key} is missing; it names the rows of {key}", hint=self._index_hint()
            )
        if (have := get_length(file, index_key)) != n:
            raise DataError(f"{self.where}/{self._index_key} has {have or 0:,} names, but the matrix has {n:,} rows")

    def _find_columns(self) -> dict[str, None]:
        """Return the columns in order, the listed ones first, one of which may be the index.

        A column with a slash in its name is stored in a group named after its first part, where anndata looks for it.
        """
        listed = [_attr_text(c) for c in np.atleast_1d(self._group.attrs.get("column-order", []))]
        found = dict.fromkeys(k for k in self._group if k != "__categories")
        out: dict[str, None] = {}
        folders = {self._index_key}
        for name in listed:
            parts = name.split("/")
            if name in found:
                out[name] = None
            elif len(parts) > 1 and not {"", ".", ".."} & {*parts} and self._is_there(name):
                out[name] = None
                folders.add(parts[0])
        return out | dict.fromkeys(k for k in found if k not in folders)

    def _is_there(self, name: str) -> bool:
        try:
            return get_node(self._file, f"{self._key}/{name}") is not None
        except DataError:  # it is a column, and reading it reports what is wrong
            return True

    def _has(self, name: str) -> bool:
        return name in self._columns

    def _find_index_key(self) -> str:
        """Return the name of the array of row names.

        Without an ``_index`` attribute, the usual array is meant. An empty attribute is damage, and
        the usual name may then belong to an ordinary column.
        """
        said = self._group.attrs.get("_index")
        if said is None:
            return self._find_usual_index() or _INDEX_KEYS[0]
        if not _attr_text(said):
            raise DataError(
                f"{self.where}: the attribute _index, which names the array of row names, is empty",
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
        """Row names ``start:stop``, read from the file."""
        if self._index is not None:
            return self._index[start:stop]
        key = f"{self._key}/{self._index_key}"
        values, _ = read_values(self._file, key, length=self.n, rows=slice(start, stop), checked=self._checked)
        return values if values.dtype == object else values.astype(str).astype(object)

    def forget(self) -> None:
        """Free the row names and the categories."""
        self._index = None
        self._categories.clear()
        self._merged.clear()

    def hash_stored(self, columns: Sequence[str]) -> str | None:
        """Return a hash of the row names and of some columns as they are stored, or None in unusual cases."""
        from xxhash import xxh3_128

        from vcelltools.io.hdf5.signature import hash_stored

        if not isinstance(self._file, h5py.File) or get_node(self._file, f"{self._key}/__categories") is not None:
            return None
        digest = xxh3_128()
        for name in (self._index_key, *columns):
            digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
            if not hash_stored(self._file, get_node(self._file, f"{self._key}/{name}"), digest):
                return None
        return f"stored:{digest.hexdigest()}"

    @property
    def columns(self) -> list[str]:
        """Column names in the order of the file."""
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
                    raise DataError(f"{file.filename}: the values of {key}/codes are not integers")
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
        values, missing = read_values(file, key, checked=self._checked, node=node, **whole)
        return Column(name=name, values=values, missing=missing)


class H5RecordTable(TableBase):
    """A compound dataset, in which anndata ≤ 0.6 wrote obs and var (categories in ``uns/<column>_categories``)."""

    def __init__(self, file: File, key: str, n: int, uns_key: str = "uns") -> None:
        self._file, self._uns, self.n = file, uns_key, n
        self.where = f"{file.filename}: {key}"
        self._node = need_dataset(file, key, what="the table")
        self._last: tuple[slice, np.ndarray] | None = None
        names = list(self._read(slice(0, 0)).dtype.names or ())
        self._index_key = next((k for k in ("index", "_index") if k in names), names[0] if names else "")
        if not names:
            raise DataError(f"{self.where} is not a table")
        self._columns = [c for c in names if c != self._index_key]

    @property
    def index(self) -> np.ndarray:
        """Row names, as str."""
        return self.names(0, self.n)

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop``."""
        return to_text(np.asarray(self._read(slice(start, stop))[self._index_key]))

    def forget(self) -> None:
        """Free the records."""
        self._last = None

    def _read(self, rows: slice) -> np.ndarray:
        """Return some records; the last ones requested are kept for their other columns."""
        if self._last is None or self._last[0] != rows:
            self._last = None
            self._last = (rows, read_small(self._file, self._node, length=self.n, rows=rows))
        return self._last[1]

    @property
    def columns(self) -> list[str]:
        """Column names in the order of the file."""
        return list(self._columns)

    def _load(self, name: str, rows: slice | None = None) -> Column:
        values = np.asarray(self._read(rows or slice(0, self.n))[name])
        cats_key = f"{self._uns}/{name}_categories"
        if values.dtype.kind in "iu" and get_node(self._file, cats_key) is not None:
            cats, _ = read_values(self._file, cats_key)
            return Column(name=name, codes=_get_codes(values), categories=cats)
        check_objects(f"{self.where}/{name}", values.dtype)
        return Column(name=name, values=to_text(values) if values.dtype.kind in "OSUT" else values)


class EmptyTable(TableBase):
    """A table that has row names, and only the columns that it is given."""

    def __init__(self, index: np.ndarray, *, where: str, extra: Mapping[str, np.ndarray | Column] | None = None):
        self._index, self.n, self.where = index, len(index), where
        self._extra = dict(extra or {})

    @property
    def index(self) -> np.ndarray:
        """Row names."""
        return self._index

    @property
    def columns(self) -> list[str]:
        """Column names."""
        return list(self._extra)

    def extend(self, columns: Mapping[str, np.ndarray | Column]) -> EmptyTable:
        """Return the table with further columns."""
        return EmptyTable(self._index, where=self.where, extra={**self._extra, **columns})

    def _load(self, name: str, rows: slice | None = None) -> Column:
        known, part = self._extra[name], rows or slice(None)
        if isinstance(known, Column) and known.codes is not None:
            return Column(name=name, codes=known.codes[part], categories=known.categories, ordered=known.ordered)
        values = known.values if isinstance(known, Column) else known
        assert values is not None
        return Column(name=name, values=values[part])


class PickedTable(TableBase):
    """Some rows of a table, at the positions ``rows``, in any order."""

    def __init__(self, whole: Table, rows: np.ndarray) -> None:
        self.whole, self._rows = whole, rows
        self.n, self.where, self.index_name = len(rows), whole.where, whole.index_name

    @property
    def index(self) -> np.ndarray:
        """Row names."""
        return self.whole.index[self._rows]

    def forget(self) -> None:
        """Free the row names."""
        self.whole.forget()

    @property
    def columns(self) -> list[str]:
        """Column names in the order of the file."""
        return self.whole.columns

    def _load(self, name: str, rows: slice | None = None) -> Column:
        pick = self._rows if rows is None else self._rows[rows]
        if rows is None or not len(pick):
            c = self.whole.column(name) if rows is None else self.whole.read(name, 0, 0)
        else:  # most neighbours are neighbours in the source too
            low = int(pick.min())
            c = self.whole.read(name, low, int(pick.max()) + 1)
            pick = pick - low
        return Column(
            name=name,
            values=None if c.values is None else c.values[pick],
            codes=None if c.codes is None else c.codes[pick],
            categories=c.categories,
            ordered=c.ordered,
            missing=None if c.missing is None else c.missing[pick],
        )


class JoinedTable(TableBase):
    """The obs of a modality, which falls back on the obs of the MuData file for missing columns."""

    def __init__(self, inner: TableBase, outer: TableBase) -> None:
        self._inner, self._outer = inner, outer
        self.n, self.where, self.index_name = inner.n, inner.where, inner.index_name

    @property
    def index(self) -> np.ndarray:
        """Row names of the modality."""
        return self._inner.index

    def names(self, start: int, stop: int) -> np.ndarray:
        """Row names ``start:stop`` of the modality."""
        return self._inner.names(start, stop)

    def forget(self) -> None:
        """Free the row names."""
        self._inner.forget()
        self._outer.forget()

    @property
    def columns(self) -> list[str]:
        """The columns of the modality, then those of the MuData file."""
        mine = self._inner.columns
        return mine + [c for c in self._outer.columns if c not in mine]

    def _load(self, name: str, rows: slice | None = None) -> Column:
        return (self._inner if name in self._inner.columns else self._outer)._load(name, rows)


def open_table(file: File, key: str, n: int, *, uns_key: str = "uns") -> TableBase:
    """Return the table at ``key``, in any encoding.

    Raises
    ------
    DataError
        If there is no table.
    """
    node = get_node(file, key)
    if node is None:
        raise DataError(
            f"{file.filename}: {key} is missing; it names the {'genes' if 'var' in key else 'cells'}",
            hint="the file is not a complete h5ad; write it again",
        )
    if not is_group(node):
        return H5RecordTable(file, key, n, uns_key)
    return H5Table(file, key, n)
